"""What TensorRT says while it works, kept so that a failure is one line that says why."""

from __future__ import annotations

import re
from collections import deque
from types import ModuleType
from typing import Any

_NOISE = re.compile(r"^(?:\d+: )?\[[^\]]*::\d+\] ?|\(In [\w:~<>]+ at [^\s:]+:\d+\s*|In \w+ at \S+:\d+\s*$")
_NO_MEMORY = re.compile(r"out ?of ?memory|could not be allocated|bad_alloc|MemoryAllocation", re.I)
_LISTING = ("Layers:", "Engine Layer Information:")


class Heard:
    """The errors since `clear`, oldest first, and the last listing of an engine's layers."""

    def __init__(self) -> None:
        self._errors: deque[str] = deque(maxlen=20)
        self.listing = ""

    def clear(self) -> None:
        self._errors.clear()
        self.listing = ""

    def error(self, message: str) -> None:
        self._errors.append(" ".join(_NOISE.sub("", message).split()))

    def verbose(self, message: str) -> None:
        if message.startswith(_LISTING):
            self.listing = message

    @property
    def text(self) -> str:
        """The errors in one line. The first is nearest to the cause: what follows it are its consequences."""
        return "; ".join(dict.fromkeys(list(self._errors)[:3]))[:600]

    @property
    def out_of_memory(self) -> bool:
        return any(_NO_MEMORY.search(message) for message in self._errors)


def make_logger(trt: ModuleType) -> tuple[Any, Heard]:
    """A TensorRT logger that prints nothing, and what it hears. TensorRT takes one logger a process."""
    severity = trt.ILogger.Severity
    errors = (severity.INTERNAL_ERROR, severity.ERROR)
    heard = Heard()

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level in errors:
                heard.error(message)
            elif level == severity.VERBOSE:
                heard.verbose(message)

    return Logger(), heard
