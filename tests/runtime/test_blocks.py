"""The block manager alone: ownership, prefix reuse in both layouts, eviction, and that its books catch mistakes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.runtime.batch import BlockCopy
from llmlab.runtime.blocks import BlockManager, IntegrityError


def ids(*tokens):
    return np.array(tokens, np.int64)


def take(manager, tokens, *, reuse=True):
    """Allocate for `tokens`: the blocks, the copies and how many tokens were there already."""
    allocation = manager.can_allocate(tokens, reuse=reuse)
    assert allocation is not None
    blocks, copies = manager.allocate(allocation)
    return blocks, copies, allocation.num_cached


def run(manager, tokens, *, keep=True):
    """A sequence that computes all of `tokens` and ends."""
    blocks, _, cached = take(manager, tokens)
    manager.record(blocks, tokens, cached)
    manager.free(blocks, keep=keep)
    assert blocks == []


def test_lowest_free_block_first():
    manager = BlockManager(6, 4)
    a, b, c = (take(manager, ids(*range(n)))[0] for n in (8, 1, 5))
    assert (a, b, c) == ([0, 1], [2], [3, 4])
    manager.free(b)
    manager.free(a)
    assert manager.drain_dead() == [0, 1, 2] and manager.drain_dead() == []
    assert take(manager, ids(*range(4)))[0] == [0]
    assert manager.allocate_one() == 1


def test_asking_changes_nothing():
    manager = BlockManager(4, 4, prefix_cache=True)
    run(manager, ids(*range(10)))
    before = (list(manager._free), dict(manager._cached), list(manager._references))
    assert manager.can_allocate(ids(*range(16)), reuse=True) is not None
    assert manager.can_allocate(ids(*range(17)), reuse=True) is None
    assert manager.can_allocate(ids(*range(16)), reuse=True, spare=1) is None
    assert (manager._free, manager._cached, manager._references) == before


def test_a_block_that_found_a_new_owner_is_not_dead():
    manager = BlockManager(2, 4)
    blocks, *_ = take(manager, ids(1, 2, 3, 4, 5))
    manager.free(blocks)
    take(manager, ids(1))
    assert manager.drain_dead() == [1]


def test_without_prefix_cache_everything_dies():
    manager = BlockManager(4, 4)
    run(manager, ids(*range(10)))
    assert manager.drain_dead() == [0, 1, 2]
    assert take(manager, ids(*range(10)))[2] == 0
    manager.check_integrity([[0, 1, 2]])


def test_full_blocks_are_shared_and_the_tail_is_copied():
    manager = BlockManager(8, 4, prefix_cache=True)
    tokens = ids(*range(11))
    first, *_ = take(manager, tokens)
    manager.record(first, tokens, 0)
    second, copies, cached = take(manager, ids(*range(10), 99, 98))
    assert second[:2] == first[:2] and second[2] not in first
    assert copies == [BlockCopy(first[2], second[2], 2)] and cached == 10
    manager.check_integrity([first, second])
    manager.free(first)
    manager.check_integrity([second])


@pytest.mark.parametrize("length", [1, 2, 4, 5, 8, 9])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_one_token_is_always_left_to_compute(length, block_size):
    manager = BlockManager(32, block_size, prefix_cache=True)
    run(manager, ids(*range(length)))
    assert take(manager, ids(*range(length)))[2] == length - 1


def test_same_tokens_after_another_prefix_are_not_shared():
    manager = BlockManager(8, 2, prefix_cache=True)
    run(manager, ids(1, 2, 3, 4))
    assert take(manager, ids(9, 2, 3, 4, 5))[2] == 0
    assert take(manager, ids(3, 4, 5))[2] == 0
    assert take(manager, ids(1, 2, 3, 4, 5))[2] == 4


def test_slot_is_taken_over_when_it_is_a_pure_extension():
    manager = BlockManager(3, 64, prefix_cache=True)
    run(manager, ids(1, 2, 3))
    assert take(manager, ids(1, 2, 3, 4)) == ([0], [], 3)


def test_slot_is_copied_while_there_is_room_else_taken_over():
    manager = BlockManager(2, 64, prefix_cache=True)
    run(manager, ids(1, 2, 3, 4, 5))
    blocks, copies, cached = take(manager, ids(1, 2, 3, 9))
    assert (blocks, copies, cached) == ([1], [BlockCopy(0, 1, 3)], 3)
    assert take(manager, ids(1, 2, 8, 8)) == ([0], [], 2)
    # What was cut off can't be found any more, what is left can.
    assert manager._match(ids(1, 2, 3, 4, 5))[1:] == (0, 2)
    assert manager.can_allocate(ids(1), reuse=True) is None


def test_running_slot_lends_its_prompt():
    manager = BlockManager(2, 64, prefix_cache=True)
    tokens = ids(1, 2, 3, 4)
    first, *_ = take(manager, tokens)
    assert take(manager, tokens)[2] == 0  # nothing is computed yet
    manager.record(first, tokens[:2], 0)
    assert manager._match(tokens)[1:] == (0, 2)
    manager.record(first, tokens, 2)
    assert manager._match(tokens)[1:] == (0, 4)


def test_least_recently_used_goes_first_and_ends_before_beginnings():
    manager = BlockManager(4, 2, prefix_cache=True)
    run(manager, ids(1, 2, 3, 4))
    run(manager, ids(5, 6, 7, 8))
    run(manager, ids(1, 2, 3, 4))  # used again
    assert manager.can_allocate(ids(5, 6, 7, 8, 9), reuse=True).num_cached == 4
    take(manager, ids(20))
    assert manager.can_allocate(ids(5, 6, 7, 8, 9), reuse=True).num_cached == 2
    assert manager.can_allocate(ids(1, 2, 3, 4, 9), reuse=True).num_cached == 4


def test_matched_blocks_are_not_counted_as_room():
    manager = BlockManager(3, 2, prefix_cache=True)
    run(manager, ids(1, 2, 3, 4))
    assert manager.can_allocate(ids(1, 2, 3, 4, 5, 6), reuse=True) is not None
    assert manager.can_allocate(ids(1, 2, 3, 4, 5, 6, 7), reuse=True) is None
    assert manager.can_allocate(ids(1, 2, 9, 9, 9, 9), reuse=True) is not None


def test_contents_that_cannot_be_trusted_are_not_kept():
    manager = BlockManager(4, 4, prefix_cache=True)
    run(manager, ids(*range(8)), keep=False)
    assert manager.drain_dead() == [0, 1]
    assert take(manager, ids(*range(8)))[2] == 0


def test_equal_blocks_computed_twice_are_kept_once():
    manager = BlockManager(4, 2, prefix_cache=True)
    tokens = ids(1, 2, 3)
    first, second = take(manager, tokens)[0], take(manager, tokens)[0]
    manager.record(first, tokens[:2], 0)
    manager.record(second, tokens[:2], 0)
    manager.free(second)
    assert manager.drain_dead() == [2, 3]
    manager.check_integrity([first])
    assert take(manager, tokens)[0][0] == first[0]


def test_integrity_catches_what_is_wrong():
    manager = BlockManager(4, 4, prefix_cache=True)
    tokens = ids(1, 2, 3, 4, 5)
    blocks, *_ = take(manager, tokens)
    manager.record(blocks, tokens, 0)
    manager.check_integrity([blocks])
    with pytest.raises(IntegrityError, match="references"):
        manager.check_integrity([])  # leaked
    with pytest.raises(IntegrityError, match="references"):
        manager.check_integrity([blocks, blocks])  # held twice, counted once
    manager._free.append(blocks[0])
    with pytest.raises(IntegrityError, match="states"):
        manager.check_integrity([blocks])
    manager._free.pop()
    lost = manager._free.pop()
    with pytest.raises(IntegrityError, match=f"block {lost} is in 0"):
        manager.check_integrity([blocks])
    manager._free.append(lost)
    manager._children.clear()
    with pytest.raises(IntegrityError, match="index"):
        manager.check_integrity([blocks])


@settings(derandomize=True, database=None, deadline=None, max_examples=150)
@given(
    st.sampled_from([1, 2, 4, 32]),
    st.integers(2, 12),
    st.booleans(),
    st.lists(
        st.tuples(st.sampled_from("aagrf"), st.lists(st.integers(0, 1), min_size=1, max_size=12), st.integers(0, 99)),
        max_size=40,
    ),
)
def test_books_balance_and_matches_are_true(block_size, num_blocks, prefix_cache, actions):
    """A mirror of what each block holds: every reused token must be the one that was put there."""
    manager = BlockManager(num_blocks, block_size, prefix_cache=prefix_cache)
    live: list[tuple[list[int], list[int], int]] = []
    holds = [[None] * block_size for _ in range(num_blocks)]

    def write(blocks, tokens, start):
        for at in range(start, len(tokens)):
            holds[blocks[at // block_size]][at % block_size] = tuple(tokens[: at + 1])

    for action, tokens, pick in actions:
        if action == "a":
            allocation = manager.can_allocate(ids(*tokens), reuse=True)
            if allocation is None:
                continue
            blocks, copies = manager.allocate(allocation)
            for copy in copies:
                holds[copy.dst][: copy.num_tokens] = holds[copy.src][: copy.num_tokens]
            for at in range(allocation.num_cached):
                assert holds[blocks[at // block_size]][at % block_size] == tuple(tokens[: at + 1])
            write(blocks, tokens, allocation.num_cached)
            manager.record(blocks, ids(*tokens), allocation.num_cached)
            live.append((blocks, tokens, 0))
        elif live and action == "g":  # grow by one token
            blocks, known, _ = live[pick % len(live)]
            if len(known) % block_size == 0:
                if not manager.num_available:
                    continue
                blocks.append(manager.allocate_one())
            known.append(tokens[0])
            write(blocks, known, len(known) - 1)
            manager.record(blocks, ids(*known), len(known) - 1)
        elif live:
            blocks, *_ = live.pop(pick % len(live))
            manager.free(blocks, keep=action == "f")
            for block in manager.drain_dead():
                holds[block] = [None] * block_size
        manager.check_integrity([blocks for blocks, *_ in live])
    for blocks, *_ in live:
        manager.free(blocks)
    manager.check_integrity([])
    assert manager.num_available == num_blocks
