"""LLM: prompts in, results out, in the caller's own thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

from llmlab.errors import EngineError, InputError
from llmlab.runtime.core import EngineCore
from llmlab.runtime.outputs import Delta, Result
from llmlab.runtime.progress import progress_bar
from llmlab.runtime.scheduler import Batching
from llmlab.runtime.session import Frontend, Message, Params, Prompt, Session, split_conversations, split_prompts
from llmlab.runtime.turn import Turn
from llmlab.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llmlab.runtime.batch import Backend
    from llmlab.runtime.params import SamplingParams


DEFAULT_NUM_SEQS = 32


class EngineManifest(Protocol):
    """What LLM reads of an engine's manifest."""

    @property
    def max_num_seqs(self) -> int: ...

    @property
    def eos_token_ids(self) -> Sequence[int]: ...

    @property
    def generation(self) -> Mapping[str, Any]: ...


class LoadedEngine(Protocol):
    """What LLM needs of an engine; llmlab.Engine is one."""

    @property
    def path(self) -> Path: ...

    @property
    def manifest(self) -> EngineManifest: ...

    def backend(
        self,
        *,
        max_num_seqs: int,
        threads: int | None = None,
        kv_blocks: int | None = None,
        kv_memory_fraction: float | None = None,
    ) -> Backend: ...


class Stream(Iterator[Delta]):
    """The pieces of one answer as they are generated. Closing it, or dropping it half-way, cancels the request."""

    def __init__(self, deltas: Generator[Delta, None, None], session: Session) -> None:
        self._deltas = deltas
        self._session = session

    def __next__(self) -> Delta:
        return next(self._deltas)

    def close(self) -> None:
        self._deltas.close()

    @property
    def result(self) -> Result:
        """All that was generated so far, with its metrics; complete once the stream has ended."""
        return self._session.result()


class LLM:
    """An engine ready to answer.

    engine: an Engine, or the path of an engine folder
    threads: of the CPU engine; None takes the number of physical cores
    max_num_seqs: most sequences in flight; more wait their turn. None: 32, or what a step of this engine holds
    max_tokens_per_step: most tokens that a step works on, which bounds how long a prompt can hold up others; None
        takes the engine's limit
    prefix_cache: keep the keys and values of ended sequences and reuse them for prompts that begin alike
    kv_blocks: of a TensorRT engine: blocks in the KV pool. None: as many as kv_memory_fraction says
    kv_memory_fraction: of a TensorRT engine: share of the free GPU memory that the KV pool takes. None: 0.9 of it at
        most, and no more than twice what max_num_seqs sequences of full length use
    batching: "inflight"; or "static", to compare with it: a batch is admitted when all of the last one has ended

    Threads may share an LLM: their requests are batched together. One thread at a time runs a step for all, the others
    wait for what it brings. Ctrl-C takes effect between two steps, cancels the interrupted call's requests only, and
    leaves the LLM usable.
    """

    def __init__(
        self,
        engine: LoadedEngine | str | Path,
        *,
        threads: int | None = None,
        max_num_seqs: int | None = None,
        max_tokens_per_step: int | None = None,
        prefix_cache: bool = False,
        kv_blocks: int | None = None,
        kv_memory_fraction: float | None = None,
        batching: Batching = "inflight",
    ) -> None:
        self._backend, self._frontend = open_engine(
            engine,
            threads=threads,
            max_num_seqs=max_num_seqs,
            max_tokens_per_step=max_tokens_per_step,
            prefix_cache=prefix_cache,
            kv_blocks=kv_blocks,
            kv_memory_fraction=kv_memory_fraction,
            batching=batching,
        )
        self._turn = Turn()
        self._closed = False

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None if the engine has none; it then takes token ids only."""
        return self._frontend.tokenizer

    @property
    def core(self) -> EngineCore:
        """The engine core, for its statistics."""
        return self._frontend.core

    @overload
    def generate(self, prompts: str, params: SamplingParams | None = ..., *, progress: bool = ...) -> Result: ...
    @overload
    def generate(self, prompts: list[str], params: Params = ..., *, progress: bool = ...) -> list[Result]: ...
    @overload
    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: Params = ..., *, progress: bool = ...
    ) -> Result | list[Result]: ...

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None, *, progress: bool = True
    ) -> Result | list[Result]:
        """Answer one prompt, or a list of prompts together.

        prompts: text or a list of token ids for one Result; a list of such for a list of Results in the same order
        params: one SamplingParams for all, or one a prompt
        progress: a progress bar for more than one prompt, where someone can see it

        All prompts are checked before the first is queued. Raises InputError, naming the place of the bad one;
        EngineError if the engine fails.
        """
        items, single = split_prompts(prompts)
        results = self._run(self._frontend.prepare(items, params), progress=progress)
        return results[0] if single else results

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
        *,
        progress: bool = True,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Result | list[Result]:
        """Answer one conversation (a list of {'role', 'content'}), or a list of conversations together.

        template_variables are handed to the chat template (`tools`, `enable_thinking`, ...). Errors as in `generate`.
        """
        items, single = split_conversations(messages)
        sessions = self._frontend.prepare(items, params, template_variables=template_variables)
        results = self._run(sessions, progress=progress)
        return results[0] if single else results

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Stream:
        """Answer one prompt (text, token ids or a conversation) piece by piece, as an iterator of Delta."""
        [session] = self._frontend.prepare([prompt], params, template_variables=template_variables)
        return Stream(self._drive([session]), session)

    def close(self) -> None:
        """Cancel what is under way and free the engine. Calls still waiting in other threads raise EngineError."""
        with self._turn.exclusive():
            if not self._closed:
                self._closed = True
                self._frontend.cancel_all("this LLM was closed")
                self._backend.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, sessions: list[Session], *, progress: bool) -> list[Result]:
        answers = sum(session.request.params.n for session in sessions)
        with progress_bar(answers, progress and len(sessions) > 1) as advance:
            for delta in self._drive(sessions):
                advance(delta)
        return [session.result() for session in sessions]

    def _drive(self, sessions: list[Session]) -> Generator[Delta, None, None]:
        """Queue sessions and yield their pieces until all have ended; whatever breaks this off cancels them."""
        mailbox: deque[tuple[Session, Delta]] = deque()
        for session in sessions:
            session.mailbox = mailbox
        try:
            with self._turn.exclusive():
                self._check_open()
                self._frontend.submit(sessions)
            unfinished = sum(session.request.params.n for session in sessions)
            while unfinished:
                with self._turn.step(lambda: mailbox or self._closed) as mine:
                    if mine:
                        for session, delta in self._frontend.step():
                            session.mailbox.append((session, delta))
                if not mailbox:
                    self._check_open()
                while mailbox:
                    session, delta = mailbox.popleft()
                    if session.error is not None:
                        raise EngineError(session.error)
                    unfinished -= delta.finish_reason is not None
                    yield delta
        finally:
            self._turn.post(lambda: self._cancel(sessions))

    def _cancel(self, sessions: list[Session]) -> None:
        for session in sessions:
            self._frontend.cancel(session)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("this LLM was closed: make a new one")


def open_engine(
    engine: LoadedEngine | str | Path,
    *,
    threads: int | None,
    max_num_seqs: int | None,
    max_tokens_per_step: int | None,
    prefix_cache: bool,
    kv_blocks: int | None,
    kv_memory_fraction: float | None,
    batching: Batching = "inflight",
) -> tuple[Backend, Frontend]:
    """An engine's backend with a core and a front-end over it."""
    if isinstance(engine, (str, Path)):
        from llmlab.runtime.engine import Engine

        engine = Engine.load(engine)
    if max_num_seqs is None:
        max_num_seqs = min(DEFAULT_NUM_SEQS, engine.manifest.max_num_seqs)
    if isinstance(max_num_seqs, bool) or not isinstance(max_num_seqs, int) or max_num_seqs < 1:
        raise InputError(f"max_num_seqs is {max_num_seqs!r}, expected an integer of at least 1")
    tokenizer = Tokenizer(engine.path) if (engine.path / "tokenizer.json").is_file() else None
    eos_token_ids = tuple(engine.manifest.eos_token_ids)
    backend = engine.backend(
        threads=threads, max_num_seqs=max_num_seqs, kv_blocks=kv_blocks, kv_memory_fraction=kv_memory_fraction
    )
    try:
        if max_tokens_per_step is None:
            max_tokens_per_step = backend.limits.max_tokens_per_step
        core = EngineCore(
            backend,
            max_num_seqs=max_num_seqs,
            max_tokens_per_step=max_tokens_per_step,
            eos_token_ids=eos_token_ids,
            prefix_cache=prefix_cache,
            batching=batching,
        )
    except InputError:
        backend.close()
        raise
    return backend, Frontend(core, tokenizer, eos_token_ids=eos_token_ids, generation_config=engine.manifest.generation)
