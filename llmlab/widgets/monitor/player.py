"""The thread that steps for the monitor: by itself while it plays, and when it is asked to."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from llmlab.errors import InputError, LlmlabError


class Player:
    """Runs `step` at `speed` steps a second while `playing`, and tasks between them, all on one thread.

    lock: held by callers of all methods but `close`
    step(): one step; it sets `playing` to False where nothing is left to do. done(of_task, problem): called after each step and task,
    on the thread and without the lock; problem is one line, or empty
    """

    def __init__(self, lock: threading.RLock, *, step: Callable[[], object], done: Callable[[bool, str], None]) -> None:
        self.playing = False
        self.speed = 2.0
        """Steps a second."""
        self._step, self._done = step, done
        self._todo: deque[Callable[[], object]] = deque()
        self._wake = threading.Condition(lock)
        self._thread: threading.Thread | None = None
        self._closed = False

    def play(self) -> None:
        self.playing = True
        self._wake_up()

    def pause(self) -> None:
        self.playing = False
        self._wake.notify_all()

    def set_speed(self, speed: float) -> None:
        self.speed = min(max(speed, 0.1), 100.0)
        self._wake.notify_all()

    def later(self, task: Callable[[], object]) -> None:
        """Run `task` on the thread as soon as the step is over that runs now."""
        self._todo.append(task)
        self._wake_up()

    def close(self) -> None:
        """Stop and wait for the step that runs."""
        with self._wake:
            self._closed, self.playing = True, False
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _wake_up(self) -> None:
        if self._closed:
            raise InputError("this monitor was closed: make a new one")
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="llmlab-monitor", daemon=True)
            self._thread.start()
        self._wake.notify_all()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._todo or self.playing)
                if self._closed:
                    return
                task = self._todo.popleft() if self._todo else None
            problem = _problem(task or self._step)
            with self._wake:
                self.playing = self.playing and not problem
            self._done(task is not None, problem)
            with self._wake:
                if self.playing:
                    self._wake.wait_for(lambda: self._closed or self._todo or not self.playing, 1 / self.speed)


def _problem(task: Callable[[], object]) -> str:
    try:
        task()
    except LlmlabError as error:
        return str(error)
    except Exception as error:  # a bug of ours, such as books that don't balance; the panel has to say so
        return f"{type(error).__name__}: {error}"
    return ""
