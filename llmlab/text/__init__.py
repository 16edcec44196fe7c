"""Text to token ids and back: the tokenizer that comes with a model, and its chat template, which is treated as hostile; files of texts.

Imports only `errors` and `files`; the runtime, calibration and evaluation read it.
"""
