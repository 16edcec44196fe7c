"""What TensorRT says while it works, kept so that a failure is one line that says why."""

from __future__ import annotations

import re
from collections import deque
from types import ModuleType
from typing import Any

_PLACE = r"[\w./:~<>]*\.(?:cpp|h|inl)(?:::?\w*)*:\d+"  # in TensorRT's own sources
_NOISE = re.compile(
    rf"^(?:\d+: )?\[{_PLACE}\] ?|\[{_PLACE}(?:: \w+)?\] |^{_PLACE}: (?:ERROR: {_PLACE} In function \w+: (?:\[\d+\] )?)?"
    rf"|\(In \w+ at {_PLACE} ?|\.? *In \w+ at {_PLACE}(?=\)|$)"
)
_NO_NEWS = re.compile(
    r"^--- (?:Begin|End) node ---|cudaError 35\b"
)  # a build without a driver says 35 beside any other error
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
        self._errors.append(_NOISE.sub("", " ".join(message.split())).rstrip(" :"))

    def verbose(self, message: str) -> None:
        if message.startswith(_LISTING):
            self.listing = message

    @property
    def text(self) -> str:
        """The errors in one line. The first is nearest to the cause; what only repeats an earlier one is left out."""
        news: list[str] = []
        for message in sorted(self._errors, key=lambda m: bool(_NO_NEWS.search(m))):
            if not any(earlier in message for earlier in news) and not (news and _NO_NEWS.search(message)):
                news.append(message)
        return "; ".join(news[:3])[:600]

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
            if level in errors or "CUDA initialization failure" in message:  # 8.6 calls that a warning
                heard.error(message)
            elif level == severity.VERBOSE:
                heard.verbose(message)

    return Logger(), heard
