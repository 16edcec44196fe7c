"""Random traffic on tiny pools: every request ends, with the tokens that it has alone, and no block is lost.

The same scenarios are run with deliberately broken parts, each of which must be noticed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from toy import ToyBackend, true_logits
from toy_device import ToyDevice

from llmlab.errors import InputError
from llmlab.runtime.blocks import BlockManager, IntegrityError
from llmlab.runtime.core import EngineCore
from llmlab.runtime.params import SamplingParams
from llmlab.runtime.request import Request
from llmlab.runtime.scheduler import Scheduler

VOCAB, MAX_SEQ_LEN = 16, 48


@dataclasses.dataclass(frozen=True)
class Job:
    arrives: int
    """Step."""
    prompt: tuple[int, ...]
    max_tokens: int
    n: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    cancelled: int | None
    """Steps after its arrival."""
    finished: int | None
    """Tokens after which the front-end ends its first completion."""
    asks: str | None
    """What keeps the device from choosing all tokens, or from keeping the logits to itself."""


@dataclasses.dataclass(frozen=True)
class Scenario:
    block_size: int
    num_blocks: int
    max_num_seqs: int
    budget: int
    prefix_cache: bool
    batching: str
    fails_at: int | None
    """Step of the backend that raises an error."""
    interrupted_at: int | None
    """Step of the backend in which Ctrl-C comes."""
    early: bool
    """Whether they come while the step is handed to a device, not while it is waited for."""
    jobs: tuple[Job, ...]


BEGINNINGS = ((1,), (1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4, *range(12)), (5,) * 17)


@functools.cache
def answer(beginning):
    """What the model says after a beginning, greedily."""
    tokens = list(beginning)
    for _ in range(12):
        tokens.append(int(true_logits(tokens, VOCAB).argmax()))
    return tuple(tokens[len(beginning) :])


@st.composite
def prompts(draw):
    """Prompts that often begin alike, or go on after an answer that another job may have got."""
    beginning = draw(st.sampled_from(((), *BEGINNINGS)))
    said = answer(beginning)[: draw(st.sampled_from([0, 3, 6, 12]))] if beginning else ()
    own = draw(st.lists(st.integers(0, 2), max_size=draw(st.sampled_from([2, 14]))))
    return (*beginning, *said, *own) or (1,)


jobs = st.builds(
    Job,
    arrives=st.integers(0, 3) | st.integers(0, 40),
    prompt=prompts(),
    max_tokens=st.sampled_from([1, 2, 4, 7, 13, 24]),  # an answer's last token has no keys: 3, 6 or 12 have
    n=st.sampled_from([1, 1, 1, 2, 3]),
    temperature=st.sampled_from([0.0, 1.0]),
    stop_token_ids=st.sampled_from([(), (), (3,)]),
    cancelled=st.none() | st.integers(0, 20),
    finished=st.none() | st.integers(1, 8),
    asks=st.sampled_from([None, None, None, "penalty", "min_tokens", "logprobs"]),
)


@st.composite
def scenarios(draw):
    block_size = draw(st.sampled_from([1, 4, 16, MAX_SEQ_LEN]))
    max_num_seqs = draw(st.integers(1, 5))
    smallest, largest = -(-12 // block_size), -(-draw(st.sampled_from([30, 60, 120])) // block_size)
    return Scenario(
        block_size=block_size,
        num_blocks=draw(st.integers(smallest, max(largest, smallest + 2))),
        max_num_seqs=max_num_seqs,
        budget=draw(st.integers(max_num_seqs, max_num_seqs + 20)),
        prefix_cache=draw(st.booleans()),
        batching=draw(st.sampled_from(["inflight", "inflight", "inflight", "static"])),
        fails_at=draw(st.none() | st.integers(1, 40)),
        interrupted_at=draw(st.none() | st.integers(1, 40)),
        early=draw(st.booleans()),
        jobs=tuple(draw(st.lists(jobs, min_size=1, max_size=8))),
    )


def request_of(job, name, index=None):
    params = SamplingParams(
        max_tokens=job.max_tokens,
        n=job.n if index is None else 1,
        temperature=job.temperature,
        stop_token_ids=job.stop_token_ids,
        repetition_penalty=1.3 if job.asks == "penalty" else 1.0,
        min_tokens=min(3, job.max_tokens) if job.asks == "min_tokens" else 0,
        logprobs=1 if job.asks == "logprobs" else None,
        seed=100 + (index or 0),
    )
    return Request(name, job.prompt, params)


@functools.cache
def alone(job, index, block_size, num_blocks):
    """Tokens and reason of one completion that has the pool to itself and its prompt computed in one go."""
    backend = ToyBackend(block_size=block_size, num_blocks=num_blocks, vocab_size=VOCAB, max_seq_len=MAX_SEQ_LEN)
    core = EngineCore(backend, max_num_seqs=1, max_tokens_per_step=64)
    core.add(request_of(job, "alone", index))
    tokens, reason = [], None
    while reason is None:
        [update] = core.step()
        tokens += update.token_ids
        reason = update.finish_reason
    return tokens, reason


def play(scenario, backend_class=ToyBackend, core_class=EngineCore, max_steps=1500):
    """Run a scenario and check all that must hold. Returns what happened, counted."""
    backend = backend_class(
        block_size=scenario.block_size,
        num_blocks=scenario.num_blocks,
        vocab_size=VOCAB,
        max_seq_len=MAX_SEQ_LEN,
        fail_at={scenario.fails_at},
        interrupt_at={scenario.interrupted_at},
        **({"early": scenario.early} if issubclass(backend_class, ToyDevice) else {}),
    )
    core = core_class(
        backend,
        max_num_seqs=scenario.max_num_seqs,
        max_tokens_per_step=scenario.budget,
        prefix_cache=scenario.prefix_cache,
        batching=scenario.batching,
    )
    tokens: dict[tuple[str, int], list[int]] = {}
    reasons: dict[tuple[str, int], str] = {}
    happened: Counter[str] = Counter()
    last_arrival = max(job.arrives for job in scenario.jobs)
    for step in range(max_steps):
        for number, job in enumerate(scenario.jobs):
            name = str(number)
            if job.arrives == step:
                if len(job.prompt) > scenario.num_blocks * scenario.block_size:
                    with pytest.raises(InputError):
                        core.add(request_of(job, name))
                    happened["refused"] += 1
                else:
                    core.add(request_of(job, name))
                    tokens |= {(name, index): [] for index in range(job.n)}
            if job.cancelled is not None and job.arrives + job.cancelled == step:
                core.cancel(name)
                core.check_integrity()
        try:
            updates = core.step()
        except KeyboardInterrupt:
            updates, happened["interrupted"] = [], 1
        for update in updates:
            key = update.request_id, update.index
            assert key not in reasons, "an update after the end"
            tokens[key] += update.token_ids
            told = scenario.jobs[int(key[0])].asks == "logprobs" and update.token_ids
            assert [entry.token_id for entry in update.logprobs or ()] == (update.token_ids if told else [])
            if update.finish_reason is not None:
                reasons[key] = "failed" if "broke" in (update.error or "") else update.finish_reason
            elif scenario.jobs[int(key[0])].finished == len(tokens[key]) and key[1] == 0:
                core.finish(*key, "stop")
                reasons[key] = "finished"
        core.check_integrity()
        if step >= last_arrival and not core.has_work:
            break
    assert not core.has_work, f"not done after {max_steps} steps"
    assert reasons.keys() == tokens.keys()
    assert core._blocks.num_available == scenario.num_blocks
    for (name, index), reason in reasons.items():
        job = scenario.jobs[int(name)]
        expected, expected_reason = alone(job, index, scenario.block_size, scenario.num_blocks)
        got = tokens[name, index]
        happened[reason] += 1
        if reason in ("cancelled", "failed"):
            assert (job.cancelled if reason == "cancelled" else scenario.fails_at) is not None
            assert got == expected[: len(got)]
        elif reason == "finished":
            assert len(got) == job.finished and got == expected[: len(got)]
        else:
            assert (got, reason) == (expected, expected_reason)
    total = core.stats.total
    happened.update(preemptions=total.preemptions, cached=total.cached_tokens, copied=backend.copied, steps=total.steps)
    happened.update(dropped=total.dropped_tokens, ahead=getattr(backend, "ahead", 0))
    happened["split"] = int(total.prefill_tokens > 0 and any(len(j.prompt) > scenario.budget for j in scenario.jobs))
    return happened


def profile(examples):
    return settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=examples,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def check_many(examples):
    happened: Counter[str] = Counter()

    @profile(examples)
    @given(scenarios())
    def run(scenario):
        happened.update(play(scenario))

    run()
    return happened


EVERYTHING = (
    *("preemptions", "cached", "copied", "split", "refused", "interrupted"),
    *("cancelled", "finished", "failed", "stop", "length", "error"),
)


def test_random_traffic():
    happened = check_many(250)
    assert all(happened[what] > 10 for what in EVERYTHING), happened  # the scenarios are real


@pytest.mark.slow
def test_random_traffic_at_length():
    happened = check_many(5000)
    assert all(happened[what] > 100 for what in EVERYTHING), happened


class ShortKeys(ToyBackend):
    """Attends to one key less than there is."""

    def read(self, blocks, length):
        return super().read(blocks, max(length - 1, 0))


class NoCopies(ToyBackend):
    def copy(self, copy):
        self.copied += copy.num_tokens


class ShortCopies(ToyBackend):
    def copy(self, copy):
        super().copy(dataclasses.replace(copy, num_tokens=copy.num_tokens - 1))


class CopiesOutOfOrder(ToyBackend):
    """Copies after the step's own keys are written."""

    def execute(self, batch):
        logits = super().execute(dataclasses.replace(batch, copies=()))
        for copy in batch.copies:
            self.copy(copy)
        return logits


class LatePositions(ToyBackend):
    """Positions of split prompts start again at 0."""

    def run_row(self, batch, b, states):
        first, last = batch.query_start[b : b + 2]
        if last - first > 1:
            batch.position_ids[first:last] -= batch.position_ids[first]
        super().run_row(batch, b, states)


class SwappedBlocks(ToyBackend):
    def execute(self, batch):
        table = batch.block_table
        rows = (table[:, 1:2] >= 0).all(axis=1)
        table[rows, :2] = table[rows, 1::-1]
        return super().execute(batch)


class Foreign(ToyBackend):
    """Every sequence uses the block table of the one before it."""

    def check(self, batch): ...

    def execute(self, batch):
        return super().execute(dataclasses.replace(batch, block_table=np.roll(batch.block_table, 1, axis=0)))


def broken_core(**replacements):
    """An EngineCore whose block manager or scheduler has some methods replaced, given as blocks__free=..."""

    class Broken(EngineCore):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for path, method in replacements.items():
                part, name = path.split("__")
                target = {"blocks": self._blocks, "scheduler": self._scheduler}[part]
                setattr(target, name, functools.partial(method, target))

    return Broken


def acquire_without_counting(manager, block):
    """Only the first owner counts."""
    if block in manager._cached:
        BlockManager._acquire(manager, block)


def free_and_forget_one(manager, blocks, *, keep=True):
    BlockManager.free(manager, blocks[:-1] if len(blocks) > 1 else blocks, keep=keep)
    blocks.clear()


def keep_the_record_of_what_is_overwritten(manager, block, num_tokens):
    """A block that is taken over keeps the record of what it held beyond the matching tokens."""
    if num_tokens == 0:
        BlockManager._truncate(manager, block, 0)


def match_one_more(manager, tokens):
    shared, source, count = BlockManager._match(manager, tokens)
    extra = source is not None and len(shared) * manager.block_size + count < len(tokens)
    return shared, source, min(count + extra, manager.block_size - 1)


def match_without_looking_at_what_is_filled(manager, tokens):
    filled = manager._filled
    manager._filled = [manager.block_size] * manager.num_blocks
    try:
        return BlockManager._match(manager, tokens)
    finally:
        manager._filled = filled


def record_ahead(manager, blocks, tokens, start):
    """Blocks are found by tokens that will only be computed later."""
    whole = tokens.base if tokens.base is not None else tokens
    BlockManager.record(manager, blocks, whole[: min(len(tokens) + 1, len(blocks) * manager.block_size)], start)


def preempt_without_starting_over(scheduler, sequence, *, keep_blocks=True):
    computed = sequence.num_computed
    Scheduler.preempt(scheduler, sequence, keep_blocks=keep_blocks)
    sequence.num_computed = computed


def preempt_the_oldest(scheduler, sequence, *, keep_blocks=True):
    Scheduler.preempt(scheduler, scheduler.running[0], keep_blocks=keep_blocks)


def preempt_and_lose(scheduler, sequence, *, keep_blocks=True):
    Scheduler.preempt(scheduler, sequence, keep_blocks=keep_blocks)
    scheduler.waiting.remove(sequence)


def one_block_short(manager, num_tokens):
    return max(BlockManager.blocks_for(manager, num_tokens) - (num_tokens > manager.block_size), 1)


BROKEN = {
    "one key too few": (ShortKeys, EngineCore),
    "copies skipped": (NoCopies, EngineCore),
    "copies one token short": (ShortCopies, EngineCore),
    "copies after the step": (CopiesOutOfOrder, EngineCore),
    "positions of a chunk": (LatePositions, EngineCore),
    "blocks swapped": (SwappedBlocks, EngineCore),
    "another's blocks": (Foreign, EngineCore),
    "no reference count": (ToyBackend, broken_core(blocks___acquire=acquire_without_counting)),
    "a block leaks": (ToyBackend, broken_core(blocks__free=free_and_forget_one)),
    "stale record": (ToyBackend, broken_core(blocks___truncate=keep_the_record_of_what_is_overwritten)),
    "prefix one too long": (ToyBackend, broken_core(blocks___match=match_one_more)),
    "prefix of unfilled": (ToyBackend, broken_core(blocks___match=match_without_looking_at_what_is_filled)),
    "recorded too early": (ToyBackend, broken_core(blocks__record=record_ahead)),
    "preempted keeps count": (ToyBackend, broken_core(scheduler__preempt=preempt_without_starting_over)),
    "a block too few": (ToyBackend, broken_core(blocks__blocks_for=one_block_short)),
    "the oldest is preempted": (ToyBackend, broken_core(scheduler__preempt=preempt_the_oldest)),
    "a preempted one is lost": (ToyBackend, broken_core(scheduler__preempt=preempt_and_lose)),
}


RARE = {
    "prefix of unfilled": Scenario(
        block_size=16,
        num_blocks=2,
        max_num_seqs=2,
        budget=3,
        prefix_cache=False,
        batching="inflight",
        fails_at=None,
        interrupted_at=None,
        early=False,
        jobs=tuple(
            Job(0, prompt, 1, n, 0.0, (), cancelled=None, finished=None, asks=None)
            for prompt, n in (((1,), 1), ((1,), 1), ((1, 1, 0, 0, 0), 2), ((1, 1, 0, 0, 0), 2))
        ),
    )
}
"""What the search found after more than a thousand scenarios; the search itself is nightly."""


def fails(what, scenario):
    try:
        play(scenario, *BROKEN[what], max_steps=300)
    except (AssertionError, IntegrityError):
        return True
    return False


@pytest.mark.parametrize("what", RARE)
def test_rare_scenarios_notice_broken_parts(what):
    assert fails(what, RARE[what])
    play(RARE[what])  # it is the broken part that fails, not the scenario


@pytest.mark.parametrize("what", [pytest.param(w, marks=[pytest.mark.slow] * (w in RARE)) for w in BROKEN])
def test_broken_parts_are_noticed(what):
    search = settings(profile(2000), phases=[Phase.generate])
    try:
        scenario = find(scenarios(), functools.partial(fails, what), settings=search)
    except NoSuchExample:
        pytest.fail(f"2000 scenarios did not notice: {what}")
    play(scenario)  # it is the broken part that fails, not the scenario
