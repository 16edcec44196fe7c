"""How far a build is, and stopping it in the middle."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from llmlab.progress import make_bar

T = TypeVar("T")
_TICK = 0.5  # seconds between two looks at the clock


class BuildProgress:
    """A bar over the parts of a build: which one of how many, how long it has taken, how long it took last time.

    TensorRT doesn't say how long a build will take, so nothing here pretends to know.
    """

    def __init__(self, total: int) -> None:
        self.bar, self.close = make_bar(
            total, unit="part", bar_format="{n_fmt}/{total_fmt} parts |{bar}| {elapsed} {desc}"
        )
        self.phase = ""
        """What TensorRT says that it does, where it says so."""

    def watch(self, name: str, last: float | None, seconds: float) -> None:
        """Say that the part `name` is being built, for `seconds` so far; `last`: seconds that it took last time."""
        before = "" if last is None else f", {last:.0f} s last time"
        phase = f": {self.phase}" if self.phase else ""
        self.bar.set_description_str(f"{name} {seconds:.0f} s{before}{phase}")

    def done(self) -> None:
        self.phase = ""
        self.bar.update(1)


def make_monitor(trt: Any, progress: BuildProgress | None, stop: threading.Event) -> Any:
    """TensorRT's progress monitor: it ends the build once `stop` is set."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if progress is not None:
                progress.phase = name

        def step_complete(self, name: str, step: int) -> bool:
            return not stop.is_set()

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()


def run_beside(work: Callable[[], T], tick: Callable[[float], None], stop: Callable[[], None]) -> T:
    """What `work` returns or raises, run in a thread of its own so that Ctrl-C is heard at once.

    `tick` is called now and then with the seconds since the start. Ctrl-C calls `stop` and waits for the end of `work`; a
    second one doesn't wait.
    """
    result: list[T] = []
    failure: list[BaseException] = []
    over = (
        threading.Event()
    )  # Thread.join won't do: interrupted once, it takes the thread for dead (CPython 3.9 to 3.12)

    def run() -> None:
        try:
            result.append(work())
        except BaseException as problem:
            failure.append(problem)
        finally:
            over.set()

    thread = threading.Thread(target=run, name="llmlab-build", daemon=True)
    start = time.monotonic()
    try:
        thread.start()
        while not over.wait(_TICK):
            tick(time.monotonic() - start)
    except KeyboardInterrupt:
        stop()
        if thread.ident is not None:
            over.wait()
            thread.join()
        raise
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
