"""The CUDA driver in a few small classes: what an engine needs to run kernels without torch.

Imports nothing of llmlab but errors. Every call that the driver refuses becomes one line of `EngineError`. Wherever a stream is
asked for, a `Stream` or a handle (int) from elsewhere will do.
"""

from llmlab.cuda.device import Device
from llmlab.cuda.memory import DeviceBuffer, PinnedArray, copy_async, fill_async
from llmlab.cuda.module import Arguments, Function, Module
from llmlab.cuda.stream import Event, Graph, Stream

__all__ = [
    "Arguments",
    "Device",
    "DeviceBuffer",
    "Event",
    "Function",
    "Graph",
    "Module",
    "PinnedArray",
    "Stream",
    "copy_async",
    "fill_async",
]
