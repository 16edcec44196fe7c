"""One engine core, several threads: who may touch it, and when Ctrl-C may strike."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Turn:
    """Gives the core to one thread at a time.

    `exclusive` calls (short: queueing, closing) go before the next step, so that a loop of steps can't starve them.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._busy = False
        self._callers = 0
        self._posted: deque[Callable[[], None]] = deque()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait for the core and hold it."""
        with interrupts_deferred():
            with self._condition:
                self._callers += 1
                try:
                    self._condition.wait_for(lambda: not self._busy)
                    self._busy = True
                finally:
                    self._callers -= 1
            try:
                yield
            finally:
                self._release()

    @contextmanager
    def step(self, enough: Callable[[], object]) -> Iterator[bool]:
        """True: the core is the caller's for one step. False: while waiting for it, `enough()` has become true."""
        with interrupts_deferred():
            with self._condition:
                self._condition.wait_for(lambda: enough() or not (self._busy or self._callers))
                mine = not enough()
                self._busy |= mine
            try:
                yield mine
            finally:
                if mine:
                    self._release()

    def post(self, task: Callable[[], None]) -> None:
        """Run `task` with the core, now if it is free, else when it is released. Never waits.

        So it can be called from a generator's cleanup, which the garbage collector may run in the middle of a step.
        """
        with interrupts_deferred():
            self._posted.append(task)
            if self._try_take():
                self._release()

    def _try_take(self) -> bool:
        with self._condition:
            free = not self._busy
            self._busy = True
            return free

    def _release(self) -> None:
        while True:
            while self._posted:
                self._posted.popleft()()
            with self._condition:
                self._busy = False
                self._condition.notify_all()
            if not self._posted or not self._try_take():
                return


_signals: Any = getattr(signal, "_signal", signal)
"""The interpreter's own functions: those around them make enums of handlers, which takes longer than the rest of a turn."""


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let Ctrl-C wait until the core is consistent again. The third one gets through at once, should a step hang."""
    handler = _signals.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received: list[tuple[int, FrameType | None]] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append((number, frame))
        if len(received) > 2:
            handler(number, frame)

    _signals.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        _signals.signal(signal.SIGINT, handler)
        if received:
            handler(*received[0])
