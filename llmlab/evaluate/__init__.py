"""What a precision costs and wins, measured on engines: accuracy, speed, size, energy; and a search that picks.

`metrics` are plain NumPy; `samples` is the data; `teacher` gets logits out of a running engine; `reference` keeps those of
the engine that the others are held against; `accuracy` has `llmlab.evaluate`; `costs` measures in a process of its own;
`layers` says what a compiler made of a graph; `compare`, `sensitivity` and `search` are the public functions of those names. Parts may import `runtime`, `build`, `quant`,
`graph` and `zoo`; only the command line, widgets and notebooks import them.
"""

from llmlab.evaluate.accuracy import evaluate

__all__ = ["evaluate"]
