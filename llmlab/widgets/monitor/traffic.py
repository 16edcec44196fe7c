"""An engine core and what was sent to it. The same requests can be sent again, at the same steps, with other settings."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from llmlab.errors import InputError
from llmlab.runtime.core import EngineCore
from llmlab.runtime.params import SamplingParams, checked_integer
from llmlab.runtime.request import Request, checked_prompt
from llmlab.runtime.trace import Recorder, StepRecord, Trace
from llmlab.text.detokenizer import Detokenizer
from llmlab.widgets.monitor.sources import Source

Prompt = str | Sequence[int]
TOKENS_AHEAD = 16
"""Tokens that a step may work on, to begin with: so few that prompts are split."""


@dataclass(frozen=True)
class Knobs:
    """Settings of the core; changing one begins again."""

    max_num_seqs: int
    max_tokens_per_step: int
    kv_blocks: int
    prefix_cache: bool = False
    batching: Literal["inflight", "static"] = "inflight"


@dataclass(frozen=True)
class Submission:
    """A request, and before which step it comes."""

    step: int
    name: str
    prompt: str
    """For people: the text, or how many ids."""
    prompt_ids: tuple[int, ...]
    max_tokens: int
    ignore_eos: bool


@dataclass
class Output:
    """What a request brought so far."""

    text: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None


class Traffic:
    """Runs one core over a source, records it, and keeps what was submitted and cancelled.

    `step` and `restart` exclude each other; the others may be called at any time from any thread and take effect with the
    next step.
    """

    def __init__(self, source: Source, knobs: Knobs) -> None:
        self.source = source
        self.submissions: list[Submission] = []
        self.cancellations: list[tuple[int, str]] = []
        """(before which step, request)"""
        self._turn = threading.Lock()
        self._open(knobs)

    @property
    def trace(self) -> Trace:
        return self._recorder.trace

    @property
    def pending(self) -> list[Submission]:
        """What was submitted, and the core doesn't know yet."""
        return [s for s in self.submissions if s.name not in self.outputs]

    @property
    def has_work(self) -> bool:
        return self.core.has_work or bool(self.pending)

    def submit(
        self, prompts: Sequence[Prompt], *, max_tokens: int, ignore_eos: bool = False, at: int | None = None
    ) -> list[str]:
        """Queue requests before the next step, or before step `at`; their names. Raises InputError, and queues none."""
        now = len(self.trace.steps)
        at = now if at is None else checked_integer("at", at, low=now, hint="steps before it are over")
        number, new = len(self.submissions), []
        for prompt in prompts:
            number += 1
            ids = self._ids(prompt)
            shown = prompt if isinstance(prompt, str) else f"{len(ids)} token ids"
            new.append(Submission(at, str(number), shown, ids, max_tokens, ignore_eos))
            checked_prompt(_request(new[-1]), self.core.backend.limits)
        self.submissions += new
        return [s.name for s in new]

    def cancel(self, name: str) -> None:
        """End a request before the next step."""
        if name not in {s.name for s in self.submissions}:
            raise InputError(f"there is no request {name!r}: there are {len(self.submissions)}")
        self.cancellations.append((len(self.trace.steps), name))

    def step(self) -> StepRecord | None:
        """Exactly one step of the core, with what came before it; None where there is nothing to do."""
        with self._turn:
            self._deliver()
            if not self.core.has_work:
                return None
            for update in self.core.step():
                output = self.outputs[update.request_id]
                output.num_tokens += len(update.token_ids)
                reason, output.error = update.finish_reason, update.error
                ids = [i for i in update.token_ids if not (reason == "stop" and i in self.source.eos_token_ids)]
                if (detokenizer := self._detokenizers.get(update.request_id)) is not None:
                    output.text += detokenizer.push(ids) + (detokenizer.finish() if reason else "")
                output.finish_reason = reason
            return self.trace.steps[-1]

    def restart(self, *, forget: bool = False, **changes: Any) -> None:
        """Begin again at step 0 with the same requests, or without any. Raises InputError, and goes on as before."""
        knobs = replace(self.knobs, **changes)
        with self._turn:
            self._open(knobs)
            if forget:
                self.submissions, self.cancellations = [], []

    def close(self) -> None:
        with self._turn:
            self._recorder.close()
            self.source.close()

    def to_dict(self) -> dict[str, Any]:
        return {
            "knobs": asdict(self.knobs),
            "requests": [
                {"name": s.name, "before_step": s.step, "prompt": s.prompt, "prompt_tokens": len(s.prompt_ids)}
                | asdict(self.outputs.get(s.name, Output()))
                for s in self.submissions
            ],
        }

    def _open(self, knobs: Knobs) -> None:
        blocks = checked_integer("kv_blocks", knobs.kv_blocks, low=1)
        had = getattr(self, "knobs", None)
        if had is None or had.kv_blocks != blocks:
            try:
                core = self._core(knobs, self.source.open(blocks))
            except Exception:
                if had is not None:
                    self._start(had, self._core(had, self.source.open(had.kv_blocks)))
                raise
        else:
            core = self._core(knobs, self.core.backend)
        self._start(knobs, core)

    def _start(self, knobs: Knobs, core: EngineCore) -> None:
        self.knobs, self.core = knobs, core
        self.outputs: dict[str, Output] = {}
        self._detokenizers: dict[str, Detokenizer] = {}
        self._cancelled = 0
        self._recorder = Recorder(core)

    def _core(self, knobs: Knobs, backend: Any) -> EngineCore:
        return EngineCore(
            backend,
            max_num_seqs=knobs.max_num_seqs,
            max_tokens_per_step=knobs.max_tokens_per_step,
            eos_token_ids=tuple(self.source.eos_token_ids),
            prefix_cache=knobs.prefix_cache,
            batching=knobs.batching,
        )

    def _deliver(self) -> None:
        """Hand over what is due; where the core has nothing else to do, also what comes next."""
        now, pending = len(self.trace.steps), self.pending
        if pending and not self.core.has_work:
            now = max(now, min(s.step for s in pending))
        for submission in pending:
            if submission.step <= now:
                self.core.add(_request(submission))
                self.outputs[submission.name] = Output()
                if self.source.tokenizer is not None:
                    self._detokenizers[submission.name] = Detokenizer(self.source.tokenizer)
        while self._cancelled < len(self.cancellations) and self.cancellations[self._cancelled][0] <= now:
            self.core.cancel(self.cancellations[self._cancelled][1])
            self._cancelled += 1

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(int(i) for i in prompt)
        tokenizer = self.source.tokenizer
        if tokenizer is None:
            raise InputError("there is no tokenizer: give prompts as lists of token ids")
        if tokenizer.has_chat_template:
            return tuple(tokenizer.encode_chat([{"role": "user", "content": prompt}])[1])
        return tuple(tokenizer.encode(prompt))


def each_prompt(prompts: Prompt | Sequence[Prompt]) -> Sequence[Any]:
    """Several prompts, or a single one (a text, or token ids) as a list."""
    is_ids = len(prompts) > 0 and not isinstance(prompts[0], str) and not hasattr(prompts[0], "__len__")
    return [prompts] if isinstance(prompts, str) or is_ids else prompts


def _request(submission: Submission) -> Request:
    params = SamplingParams(
        max_tokens=submission.max_tokens, temperature=0, top_k=0, top_p=1, ignore_eos=submission.ignore_eos
    )
    return Request(submission.name, submission.prompt_ids, params)
