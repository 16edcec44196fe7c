"""Between callers and the engine core: prompts become requests, token updates become text. Shared by LLM and AsyncLLM.

Nothing here is thread-safe or loops; LLM and AsyncLLM each have one rule for who may call a Frontend, and when.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from llmlab.errors import InputError
from llmlab.runtime.outputs import Completion, Delta, RequestMetrics, Result
from llmlab.runtime.params import SamplingParams
from llmlab.runtime.request import FinishReason, Request, checked_prompt
from llmlab.text.detokenizer import Detokenizer, StopStrings

if TYPE_CHECKING:
    from llmlab.runtime.core import EngineCore, SequenceUpdate
    from llmlab.runtime.sampler import TokenLogprobs
    from llmlab.text.tokenizer import Tokenizer

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or a conversation (messages with 'role' and 'content') for the chat template."""
Params: TypeAlias = SamplingParams | Sequence[SamplingParams] | None


class Session:
    """One request from its prompt to its result."""

    def __init__(
        self, request: Request, prompt: str | None, tokenizer: Tokenizer | None, end_ids: frozenset[int]
    ) -> None:
        self.request = request
        self.error: str | None = None
        """Why it ended with finish_reason "error"."""
        self.mailbox: Any = None
        """Where the caller wants this request's pieces; the front-end only carries it."""
        self.started: float | None = None
        self._prompt = prompt
        self._end_ids = end_ids
        self._outputs = [_Output(tokenizer, request.params) for _ in range(request.params.n)]

    @property
    def done(self) -> bool:
        return all(output.finish_reason is not None for output in self._outputs)

    def apply(self, update: SequenceUpdate, now: float) -> Delta | None:
        """Take in one update of the core; None if that completion had ended already."""
        output = self._outputs[update.index]
        if output.finish_reason is not None:
            return None
        if update.finish_reason == "error":
            self.error = update.error or "the engine failed without saying why"
        ids = list(update.token_ids)
        ended_by_token = update.finish_reason == "stop" and bool(ids) and ids[-1] in self._end_ids
        text = output.extend(ids, ids[:-1] if ended_by_token else ids, update.finish_reason, now)
        if update.logprobs is not None:
            output.logprobs.extend(update.logprobs)
        return Delta(update.index, text, ids, update.logprobs, output.finish_reason)

    def end(self, reason: FinishReason) -> None:
        """End every completion that goes on."""
        for output in self._outputs:
            output.finish_reason = output.finish_reason or reason

    def result(self) -> Result:
        params = self.request.params
        completions = [
            Completion(
                index, "".join(o.parts), o.token_ids, o.finish_reason, None if params.logprobs is None else o.logprobs
            )
            for index, o in enumerate(self._outputs)
        ]
        return Result(self._prompt, list(self.request.prompt_ids), completions, self._metrics())

    def _metrics(self) -> RequestMetrics:
        arrival = self.request.arrival
        first, last = self._outputs[0], max((o.times[-1] for o in self._outputs if o.times), default=arrival)
        begun = arrival if self.started is None else self.started
        return RequestMetrics(
            prompt_tokens=len(self.request.prompt_ids),
            output_tokens=sum(len(o.token_ids) for o in self._outputs),
            queue_s=max(begun - arrival, 0.0),
            ttft_s=(first.times[0] - arrival) if first.times else 0.0,
            e2e_s=last - arrival,
            itl_s=[b - a for a, b in itertools.pairwise(first.times)],
        )


class _Output:
    """One completion under way."""

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams) -> None:
        self._detokenizer = Detokenizer(tokenizer) if tokenizer else None
        self._stops = StopStrings(params.stop)
        self.parts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.times: list[float] = []
        self.finish_reason: FinishReason | None = None

    def extend(self, ids: list[int], shown: list[int], reason: FinishReason | None, now: float) -> str:
        self.token_ids.extend(ids)
        self.times.extend([now] * len(ids))
        text = self._detokenizer.push(shown) if self._detokenizer else ""
        if reason is not None and self._detokenizer:
            text += self._detokenizer.finish()
        text, stopped = self._stops.push(text)
        if stopped:
            reason = "stop"
        elif reason is not None:
            text += self._stops.finish()
        self.parts.append(text)
        self.finish_reason = reason
        return text


class Frontend:
    """Makes sessions of prompts and keeps them in step with an EngineCore."""

    def __init__(
        self,
        core: EngineCore,
        tokenizer: Tokenizer | None,
        *,
        eos_token_ids: Sequence[int] = (),
        generation_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.core = core
        self.tokenizer = tokenizer
        self._eos = frozenset(eos_token_ids)
        self._defaults = dict(generation_config or {})
        self._sessions: dict[str, Session] = {}
        self._unstarted: dict[str, Session] = {}
        self._numbers = itertools.count()

    def prepare(
        self, prompts: Sequence[Prompt], params: Params = None, *, template_variables: Mapping[str, Any] | None = None
    ) -> list[Session]:
        """Check and tokenize a batch of prompts; nothing is queued. An InputError names the prompt's place.

        The one method that may be called while another thread is in `step`.
        """
        each = _params_of_each(params, len(prompts))
        return [
            self._prepare_one(prompt, own, template_variables or {}, f"prompt {place}: " if len(prompts) > 1 else "")
            for place, (prompt, own) in enumerate(zip(prompts, each, strict=True))
        ]

    def submit(self, sessions: Sequence[Session]) -> None:
        """Queue what `prepare` made."""
        for session in sessions:
            self.core.add(session.request)
            self._sessions[session.request.id] = self._unstarted[session.request.id] = session

    def step(self) -> list[tuple[Session, Delta]]:
        """One step of the core, as pieces of text. Ends the completions in which a stop string turned up."""
        before = time.perf_counter()
        updates = self.core.step()
        now = time.perf_counter()
        self._note_started(before)
        deltas = []
        for update in updates:
            session = self._sessions.get(update.request_id)
            delta = session.apply(update, now) if session else None
            if session is None or delta is None:
                continue
            if delta.finish_reason is not None and update.finish_reason is None:
                self.core.finish(update.request_id, update.index, "stop")
            if session.done:
                del self._sessions[update.request_id]
            deltas.append((session, delta))
        return deltas

    def cancel(self, session: Session) -> None:
        """End a request wherever it is; one that was never queued, or has ended, is left alone."""
        if self._sessions.pop(session.request.id, None) is not None:
            self._unstarted.pop(session.request.id, None)
            self.core.cancel(session.request.id)
            session.end("cancelled")

    def cancel_all(self, error: str | None = None) -> list[Session]:
        """Cancel every request under way and return them; `error` says why, if that is not the callers' own wish."""
        sessions = list(self._sessions.values())
        for session in sessions:
            session.error = error
            self.cancel(session)
        return sessions

    @property
    def has_work(self) -> bool:
        return bool(self._sessions)

    def _prepare_one(self, prompt: Prompt, params: SamplingParams, variables: Mapping[str, Any], where: str) -> Session:
        arrival = time.perf_counter()
        params = params.resolve(self._defaults)
        try:
            text, ids = self._tokenize(prompt, variables)
            if params.stop and self.tokenizer is None:
                raise InputError("this engine has no tokenizer, so it can't look for stop strings: use stop_token_ids")
            request = Request(id=f"request-{next(self._numbers)}", prompt_ids=ids, params=params, arrival=arrival)
            checked_prompt(request, self.core.backend.limits)
        except InputError as error:
            raise InputError(f"{where}{error}") from error
        end_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
        return Session(request, text, self.tokenizer, end_ids)

    def _note_started(self, step_began: float) -> None:
        if not self._unstarted:
            return
        for request_id in self._unstarted.keys() - self.core.waiting_requests():
            self._unstarted.pop(request_id).started = step_began

    def _tokenize(self, prompt: Prompt, variables: Mapping[str, Any]) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self._need_tokenizer().encode(prompt)
        if _is_conversation(prompt):
            return self._need_tokenizer().encode_chat(prompt, variables)  # type: ignore[arg-type]
        return None, _token_ids(prompt)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError("this engine has no tokenizer: give the prompt as a list of token ids")
        return self.tokenizer


def split_prompts(prompts: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """(prompts, whether it was a single one). A list that begins with an int or a dict is itself one prompt."""
    if isinstance(prompts, str) or (isinstance(prompts, np.ndarray) and prompts.ndim == 1):
        return [prompts], True
    if not isinstance(prompts, (Sequence, np.ndarray)) or isinstance(prompts, (bytes, bytearray)):
        raise InputError(
            f"prompts are a {type(prompts).__name__}, expected text, a list of token ids, or a list of those"
        )
    if len(prompts) and (_is_int(prompts[0]) or isinstance(prompts[0], Mapping)):
        return [prompts], True  # type: ignore[list-item]
    return list(prompts), False  # type: ignore[arg-type]


def split_conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> tuple[list[Prompt], bool]:
    """(conversations, whether it was a single one). Raises InputError for anything else."""
    items, single = split_prompts(messages)
    if not all(map(_is_conversation, items)):
        raise InputError("chat takes messages such as [{'role': 'user', 'content': '...'}], or a list of those")
    return items, single


def _is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _params_of_each(params: Params, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Sequence) or not all(isinstance(own, SamplingParams) for own in params):
        raise InputError(f"params is {params!r}, expected SamplingParams or one SamplingParams a prompt")
    if len(params) != count:
        raise InputError(
            f"params has {len(params)} entries for {count} prompts: give one a prompt, or a single one for all"
        )
    return list(params)


def _token_ids(prompt: Any) -> list[int]:
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise InputError(f"a prompt is text, a list of token ids or a list of messages, not {type(prompt).__name__}")
    for token_id in prompt:
        if not _is_int(token_id):
            raise InputError(f"a prompt of token ids holds {token_id!r}, expected integers only")
    return [int(token_id) for token_id in prompt]


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
