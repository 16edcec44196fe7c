"""A conversation with one engine or two: what was said, and what is being generated."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmlab.errors import InputError
from llmlab.widgets.chat.model import Answer, Turn
from llmlab.widgets.chat.speaker import Generation, Speaker

if TYPE_CHECKING:
    from llmlab.runtime.outputs import Delta, RequestMetrics
    from llmlab.runtime.params import SamplingParams

REDRAWS = 12.0
"""Most calls of `on_growth` a second."""
ALTERNATIVES = 5
"""Most likely tokens that are kept with each token."""


class Conversation:
    """Turns, and the threads that generate the last one's answers.

    lock: held by callers of all methods but `stop`, `wait` and `close`; the generating threads take it too
    on_growth(): answers are longer than they were. on_end(whole): an answer has ended; whole: none is generated any more.
    Both are called on a generating thread, without the lock.
    """

    def __init__(self, lock: threading.RLock, *, on_growth: Callable[[], None], on_end: Callable[[bool], None]) -> None:
        self.speakers: list[Speaker] = []
        self.turns: list[Turn] = []
        self.system = ""
        self.together = True
        """Whether two engines answer at the same time; else one after the other, so that speeds are each one's own."""
        self._lock = lock
        self._ended = threading.Condition(lock)
        self._on_growth, self._on_end = on_growth, on_end
        self._generations: list[Generation] = []
        self._told_at = 0.0
        self._closed = False

    @property
    def busy(self) -> bool:
        """Whether an answer is being generated."""
        return bool(self.turns) and self.turns[-1].going

    def messages(self, until: int | None = None) -> list[dict[str, str]]:
        """What was said, in all turns or those before turn `until`, with the answers that the conversation goes on with."""
        said = [{"role": "system", "content": self.system}] if self.system.strip() else []
        for turn in self.turns[:until]:
            said.append({"role": "user", "content": turn.user})
            said.append({"role": "assistant", "content": turn.answers[turn.kept].text})
        return said

    def ask(self, text: str, params: SamplingParams, place: int | None = None) -> None:
        """Begin to answer `text`, as turn `place` (the next one without it); what came there and later is forgotten.

        Raises InputError while an answer is being generated, and for an empty text.
        """
        self.check_free()
        if not text.strip():
            raise InputError("the message is empty: type something first")
        place = len(self.turns) if place is None else place
        messages = [*self.messages(place), {"role": "user", "content": text}]
        turn = Turn(text, [Answer(speaker.name) for speaker in self.speakers])
        self.turns, self._generations = [*self.turns[:place], turn], []
        params = dataclasses.replace(params, logprobs=ALTERNATIVES)
        for speaker, answer in zip(self.speakers, turn.answers, strict=True):
            generation = Generation(
                speaker,
                messages,
                params,
                on_piece=_bound(self._piece, speaker, answer),
                on_end=_bound(self._end, answer),
                after=self._generations[-1] if self._generations and not self.together else None,
            )
            self._generations.append(generation)
        for generation in self._generations:
            generation.start()

    def keep(self, turn: int, which: int) -> None:
        """Go on with the answer of engine `which` in that turn."""
        answers = self.turns[self.place(turn)].answers
        if not 0 <= which < len(answers):
            raise InputError(f"which is {which}, expected the place of one of the {len(answers)} answers")
        self.turns[turn].kept = which

    def clear(self) -> None:
        """Forget all turns. Raises InputError while an answer is being generated."""
        self.check_free()
        self.turns = []

    def stop(self) -> None:
        """End the answers under way before their next token; returns at once."""
        for generation in tuple(self._generations):
            generation.stop()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no answer is being generated; whether that is so. Ctrl-C stops the answers."""
        try:
            with self._ended:
                return self._ended.wait_for(lambda: not self.busy, timeout)
        except KeyboardInterrupt:
            self.stop()
            raise

    def close(self) -> None:
        """Stop, and free the engines that were opened here."""
        self._closed = True
        self.stop()
        for generation in self._generations:
            generation.join()
        for speaker in self.speakers:
            speaker.close()

    def check_free(self) -> None:
        """Raises InputError while an answer is being generated, or after `close`."""
        if self._closed:
            raise InputError("this chat was closed: make a new one")
        if self.busy:
            raise InputError("an answer is being generated: stop it first")

    def place(self, turn: int) -> int:
        """`turn`, if there is such a turn. Raises InputError."""
        if not 0 <= turn < len(self.turns):
            raise InputError(f"there is no turn {turn}: the conversation has {len(self.turns)}")
        return turn

    def _piece(self, speaker: Speaker, answer: Answer, delta: Delta) -> None:
        with self._lock:
            answer.extend(delta, speaker.tokenizer)
            now = time.monotonic()
            due = now - self._told_at > 1 / REDRAWS
            if due:
                self._told_at = now
        if due:
            self._on_growth()

    def _end(self, answer: Answer, reason: str | None, error: str, metrics: RequestMetrics | None) -> None:
        with self._ended:
            answer.going, answer.finish_reason, answer.error, answer.metrics = False, reason, error, metrics
            self._ended.notify_all()
            whole = not self.busy
        self._on_end(whole)


def _bound(function: Any, *first: Any) -> Any:
    return lambda *rest: function(*first, *rest)
