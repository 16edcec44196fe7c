"""Text to token ids and back: the tokenizer that comes with a model, and its chat template, which is treated as hostile.

Imports only `errors`; the runtime and calibration read it.
"""
