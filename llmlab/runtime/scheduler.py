"""Which sequences run in the next step, and how many tokens of each. Policy only: nothing here computes."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from llmlab.runtime.batch import BlockCopy
from llmlab.runtime.blocks import BlockManager, IntegrityError
from llmlab.runtime.request import Sequence, Status

Batching = Literal["inflight", "static"]


class Work(NamedTuple):
    """The next `num_new` tokens of a sequence, from its `num_computed` on, are to be computed."""

    sequence: Sequence
    num_new: int


@dataclass(slots=True)
class Schedule:
    """One step's work, decided and with its blocks allocated."""

    work: list[Work] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    num_preempted: int = 0
    num_cached: int = 0
    """Tokens of newly admitted sequences whose keys and values were there already."""


class Scheduler:
    """First come, first served, decided anew in each step (Yu et al., Orca, 2022).

    Running sequences that decode come first, one token each, then those in the middle of their prompt, then waiting
    ones while there are blocks, places (`max_num_seqs`) and tokens (`max_tokens_per_step`) left. Prompts longer than
    what is left are split. When a decoding sequence needs a block and there is none, the youngest running one loses its
    blocks and waits to be computed again. With `batching="static"` a batch is admitted when all of the last one ended.
    """

    def __init__(
        self, blocks: BlockManager, *, max_num_seqs: int, max_tokens_per_step: int, batching: Batching = "inflight"
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_tokens_per_step = max_tokens_per_step
        self.batching = batching
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.leaving: list[Sequence] = []
        """Ended, but a step in flight still writes their blocks."""
        self._batch: list[Sequence] = []  # static batching: those that are admitted together

    def add(self, sequences: Iterable[Sequence]) -> None:
        self.waiting.extend(sequences)

    def remove(self, sequence: Sequence, *, keep_blocks: bool = True) -> None:
        """End a sequence, wherever it is. keep_blocks=False: what is in its blocks can't be used again."""
        (self.running if sequence.status is Status.RUNNING else self.waiting).remove(sequence)
        sequence.status = Status.FINISHED
        sequence.trusted = keep_blocks
        if sequence.in_flight:
            self.leaving.append(sequence)
        else:
            self.blocks.free(sequence.blocks, keep=keep_blocks)

    def settle(self, work: Iterable[Work], *, trusted: bool) -> int:
        """A step in flight is over. trusted=False: what it wrote is unknown. How many tokens were for ended sequences.

        The blocks of those are given back now, unless the next step in flight writes them too.
        """
        num_dropped = 0
        for sequence, count in work:
            sequence.in_flight -= 1
            sequence.num_stored += count
            if sequence.status is Status.FINISHED:
                num_dropped += count
                sequence.trusted &= trusted
                if not sequence.in_flight:
                    self.leaving.remove(sequence)
                    self.blocks.free(sequence.blocks, keep=sequence.trusted)
        return num_dropped

    def preempt(self, sequence: Sequence, *, keep_blocks: bool = True) -> None:
        """Send a running sequence back to wait, to be computed again."""
        if sequence.in_flight:
            raise IntegrityError(f"sequence {sequence.order} is preempted, and a step in flight writes its blocks")
        self.running.remove(sequence)
        self.blocks.free(sequence.blocks, keep=keep_blocks)
        sequence.status = Status.WAITING
        sequence.num_computed = sequence.num_stored = 0
        _insert(self.waiting, sequence)

    def shares_blocks(self, sequence: Sequence) -> bool:
        """Whether to look for, and to record, what this sequence's blocks hold: for the cache or for its siblings."""
        return self.blocks.prefix_cache or sequence.params.n > 1

    def schedule(self, *, ahead: bool = False) -> Schedule:
        """Decide the next step and allocate its blocks. Sequences stay in `running` until `remove`d.

        ahead: a step is in flight. Nothing can be preempted then, so where a block is missing the plan is empty.
        """
        plan = Schedule()
        if not self._schedule_decodes(plan, ahead):
            return Schedule()
        budget = self.max_tokens_per_step - len(plan.work)
        for sequence in self.running:
            pending = sequence.num_tokens - sequence.num_computed
            if pending > 1 and budget > 0:
                count = min(pending, budget)
                plan.work.append(Work(sequence, count))
                budget -= count
        if not plan.num_preempted:  # what was just preempted would come straight back
            self._admit(plan, budget)
        return plan

    def check_integrity(self) -> None:
        """Raises IntegrityError when a sequence, or a block of one, is lost or in two places."""
        if any(s.status is not Status.WAITING or s.blocks or s.num_computed or s.in_flight for s in self.waiting):
            raise IntegrityError("a waiting sequence holds blocks or is in a step")
        if any(s.status is not Status.RUNNING for s in self.running):
            raise IntegrityError("a sequence that doesn't run is among the running")
        if any(s.status is not Status.FINISHED or not s.in_flight for s in self.leaving):
            raise IntegrityError("a sequence is leaving that hasn't ended or is in no step")
        for queue in (self.waiting, self.running):
            orders = [s.order for s in queue]
            if orders != sorted(set(orders)):
                raise IntegrityError(f"sequences are out of order: {orders}")
        if len(self.running) > self.max_num_seqs:
            raise IntegrityError(f"{len(self.running)} sequences run, at most {self.max_num_seqs} may")
        for s in self.running:
            most = s.num_tokens - (not s.in_flight)
            if not s.num_stored <= s.num_computed <= most or len(s.blocks) < self.blocks.blocks_for(s.num_computed):
                raise IntegrityError(f"sequence {s.order} has {s.num_computed} tokens computed in blocks {s.blocks}")
            if s.block_row[: len(s.blocks)].tolist() != s.blocks or (s.block_row[len(s.blocks) :] != -1).any():
                raise IntegrityError(f"sequence {s.order} has blocks {s.blocks} and its table row {s.block_row}")
            if (s.tokens[: s.num_tokens - s.in_flight] < 0).any():
                raise IntegrityError(f"sequence {s.order} has unknown tokens: {s.tokens[: s.num_tokens]}")
        self.blocks.check_integrity(s.blocks for s in [*self.running, *self.leaving])

    def _schedule_decodes(self, plan: Schedule, ahead: bool) -> bool:
        for sequence in list(self.running):  # oldest first, so a preempted one is never in the plan already
            if sequence.num_tokens - sequence.num_computed != 1 or sequence.status is not Status.RUNNING:
                continue
            if len(sequence.blocks) < self.blocks.blocks_for(sequence.num_tokens):
                if not self._make_room(sequence, plan, ahead):
                    return False
                if sequence.status is not Status.RUNNING:
                    continue
            plan.work.append(Work(sequence, 1))
        return True

    def _make_room(self, sequence: Sequence, plan: Schedule, ahead: bool) -> bool:
        """Get the block that the next token needs. False: that takes preemption, which has to wait."""
        while sequence.status is Status.RUNNING and len(sequence.blocks) < self.blocks.blocks_for(sequence.num_tokens):
            if self.blocks.num_available:
                sequence.add_block(self.blocks.allocate_one())
            elif ahead:
                return False
            else:
                self.preempt(self.running[-1])  # maybe this one
                plan.num_preempted += 1
        return True

    def _admit(self, plan: Schedule, budget: int) -> None:
        candidates = self.waiting
        if self.batching == "static":
            if all(sequence.finished for sequence in self._batch):
                self._batch = self.waiting[: self.max_num_seqs]
            candidates = [sequence for sequence in self._batch if sequence.status is Status.WAITING]
        admitted: list[Sequence] = []
        for sequence in candidates:
            if budget <= 0 or len(self.running) >= self.max_num_seqs:
                break
            if sequence.waits_for_sibling:
                continue
            tokens = sequence.tokens[: sequence.num_tokens]
            allocation = self.blocks.can_allocate(
                tokens, reuse=self.shares_blocks(sequence), spare=self._num_needed_next()
            )
            if allocation is None:
                break
            blocks, copies = self.blocks.allocate(allocation)
            sequence.set_blocks(blocks)
            sequence.num_computed = sequence.num_stored = allocation.num_cached
            sequence.status = Status.RUNNING
            _insert(self.running, sequence)
            admitted.append(sequence)
            count = min(sequence.num_pending, budget)
            budget -= count
            plan.work.append(Work(sequence, count))
            plan.copies += copies
            plan.num_cached += allocation.num_cached
        for sequence in admitted:
            self.waiting.remove(sequence)

    def _num_needed_next(self) -> int:
        """Blocks that running sequences need for their next token; a newcomer that took them would be preempted."""
        return sum(self.blocks.blocks_for(s.num_tokens + 1) > len(s.blocks) for s in self.running)


def _insert(queue: list[Sequence], sequence: Sequence) -> None:
    bisect.insort(queue, sequence, key=lambda other: other.order)
