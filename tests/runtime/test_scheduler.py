"""Scheduling policy alone, step by step, without a backend."""

from __future__ import annotations

import numpy as np
import pytest

from llmlab.runtime.batch import EngineLimits
from llmlab.runtime.blocks import BlockManager, IntegrityError
from llmlab.runtime.packing import pack
from llmlab.runtime.params import SamplingParams
from llmlab.runtime.request import Request, Status, expand
from llmlab.runtime.scheduler import Scheduler


class Harness:
    """A scheduler whose steps are played by hand: `step` computes what was planned and appends token 7 where ready."""

    def __init__(self, *, num_blocks=64, block_size=4, seqs=4, budget=16, batching="inflight", prefix_cache=False):
        self.limits = EngineLimits(
            vocab_size=100, max_seq_len=64, max_tokens_per_step=64, num_blocks=num_blocks, block_size=block_size
        )
        self.blocks = BlockManager(num_blocks, block_size, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(self.blocks, max_num_seqs=seqs, max_tokens_per_step=budget, batching=batching)
        self.count = 0

    def add(self, length, **params):
        request = Request(str(self.count), list(range(length)), SamplingParams(max_tokens=40, **params))
        made = expand(request, np.arange(length), limits=self.limits, eos_token_ids=frozenset(), order=self.count)
        self.count += len(made)
        self.scheduler.add(made)
        return made[0] if len(made) == 1 else made

    def step(self):
        """The plan as {order: tokens}."""
        self.plan = plan = self.scheduler.schedule()
        for sequence, count in plan.work:
            start = sequence.num_computed
            sequence.num_computed += count
            sequence.num_stored = sequence.num_computed
            if self.scheduler.shares_blocks(sequence):
                self.blocks.record(sequence.blocks, sequence.tokens[: sequence.num_computed], start)
            if sequence.num_computed == sequence.num_tokens:
                sequence.append(7)
        self.scheduler.check_integrity()
        return {sequence.order: count for sequence, count in plan.work}


def test_decodes_come_before_prefill_and_prompts_are_split():
    h = Harness(budget=8)
    h.add(3)
    assert h.step() == {0: 3}
    h.add(20)
    h.add(2)
    steps = [h.step() for _ in range(4)]
    assert steps == [{0: 1, 1: 7}, {0: 1, 1: 7}, {0: 1, 1: 6, 2: 1}, {0: 1, 1: 1, 2: 1}]
    assert list(steps[2]) == [0, 1, 2]


def test_first_come_first_served_and_places():
    h = Harness(seqs=2)
    first, _, _ = h.add(3), h.add(3), h.add(3)
    assert h.step() == {0: 3, 1: 3}
    assert h.step() == {0: 1, 1: 1}
    h.scheduler.remove(first)
    assert h.step() == {1: 1, 2: 3}


def test_a_large_prompt_is_not_overtaken():
    h = Harness(num_blocks=4, budget=64)
    h.add(9)
    h.add(8)
    h.add(1)
    assert h.step() == {0: 9}
    assert h.step() == {0: 1}


def test_newcomers_leave_the_blocks_that_the_running_need_next():
    h = Harness(num_blocks=3)
    h.add(3)
    h.step()
    assert h.scheduler.running[0].num_tokens == 4  # its next token needs a second block
    h.add(5)
    assert h.step() == {0: 1}
    # With one block more there is room for both.
    h = Harness(num_blocks=4)
    h.add(3)
    h.step()
    h.add(5)
    assert h.step() == {0: 1, 1: 5}


def test_slots_need_no_spare_blocks():
    h = Harness(num_blocks=2, block_size=64)
    h.add(3)
    h.step()
    h.add(63)
    assert h.step() == {0: 1, 1: 15}


def test_the_youngest_is_preempted_and_comes_back_first():
    h = Harness(num_blocks=4, block_size=4, budget=64)
    old, young = h.add(7), h.add(7)
    h.add(4)
    assert h.step() == {0: 7, 1: 7}
    assert h.step() == {0: 1, 1: 1}
    assert h.step() == {0: 1} and h.plan.num_preempted == 1
    assert young.status is Status.WAITING and young.num_computed == 0 and young.blocks == []
    assert [s.order for s in h.scheduler.waiting] == [1, 2]
    h.scheduler.remove(old)
    assert h.step() == {1: 9, 2: 4}  # prompt and the two tokens it had


def test_a_sequence_may_preempt_itself():
    h = Harness(num_blocks=4, budget=64)
    old, young = h.add(5), h.add(8)
    assert h.step() == {0: 5, 1: 8}
    assert h.step() == {0: 1} and young.status is Status.WAITING
    assert old.status is Status.RUNNING


def test_nobody_is_admitted_in_a_step_that_preempts():
    h = Harness(num_blocks=4, budget=64)
    h.add(7), h.add(7), h.add(1)
    h.step(), h.step()
    assert h.step() == {0: 1}
    assert h.plan.num_preempted == 1 and h.blocks.num_available == 1


def test_static_batches_wait_for_all_members():
    h = Harness(seqs=2, batching="static", budget=4)
    a, b, _ = h.add(4), h.add(4), h.add(4)
    assert [h.step(), h.step()] == [{0: 4}, {0: 1, 1: 3}]  # one batch, though its prompts take two steps
    h.scheduler.remove(a)
    assert h.step() == {1: 1}
    assert h.step() == {1: 1}
    h.scheduler.remove(b)
    assert h.step() == {2: 4}
    h.add(1)
    assert h.step() == {2: 1}  # came too late for this batch


def test_siblings_wait_for_the_prompt_and_take_it_over():
    h = Harness(budget=8, seqs=4, block_size=64, num_blocks=4)
    h.add(12, n=3)
    h.add(2)
    # What the siblings leave, the next request may have.
    assert h.step() == {0: 8}
    assert h.step() == {0: 4, 3: 2}
    assert h.step() == {0: 1, 3: 1, 1: 1, 2: 1}
    assert [(copy.src, copy.num_tokens) for copy in h.plan.copies] == [(0, 11), (0, 11)]
    assert h.plan.num_cached == 22


def test_packing_lays_sequences_end_to_end():
    h = Harness(budget=8)
    h.add(3)
    h.step()
    h.add(9)
    plan = h.scheduler.schedule()
    batch, ready = pack(plan)
    assert batch.input_ids.tolist() == [7, 0, 1, 2, 3, 4, 5, 6]
    assert batch.position_ids.tolist() == [3, 0, 1, 2, 3, 4, 5, 6]
    assert batch.query_start.tolist() == [0, 1, 8] and batch.kv_len.tolist() == [4, 7]
    assert batch.block_table[:, :4].tolist() == [[0, -1, -1, -1], [1, 2, 3, -1]]
    assert batch.logits_index.tolist() == [0] and ready == [0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda h: h.scheduler.waiting[0].blocks.append(3),
        lambda h: h.scheduler.running.append(h.scheduler.running[0]),
        lambda h: h.scheduler.running.pop(),
        lambda h: h.scheduler.running[0].blocks.pop(),
        lambda h: h.scheduler.running[0].block_row.fill(0),
        lambda h: setattr(h.scheduler.running[0], "status", Status.FINISHED),
        lambda h: setattr(h.scheduler, "max_num_seqs", 1),
    ],
)
def test_integrity_catches_what_is_wrong(damage):
    h = Harness(seqs=2)
    h.add(3), h.add(3), h.add(3)
    h.step()
    damage(h)
    with pytest.raises(IntegrityError):
        h.scheduler.check_integrity()
