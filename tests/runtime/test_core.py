"""EngineCore on the toy backend: what each call promises, and the edges of lengths, cancellation and failure."""

from __future__ import annotations

import numpy as np
import pytest
from toy import ToyBackend, true_logits

from llmlab.errors import InputError
from llmlab.runtime.core import EngineCore
from llmlab.runtime.params import SamplingParams
from llmlab.runtime.request import Request


def make(*, eos=(), prefix_cache=False, seqs=4, budget=16, batching="inflight", **limits):
    backend = ToyBackend(**limits)
    return EngineCore(
        backend,
        max_num_seqs=seqs,
        max_tokens_per_step=budget,
        eos_token_ids=eos,
        prefix_cache=prefix_cache,
        batching=batching,
    )


def request(name, prompt, **params):
    return Request(name, prompt, SamplingParams(**params))


def drain(core, results=None):
    """Step to the end: {(id, index): (tokens, reason)}; integrity is checked after each step."""
    results = {} if results is None else results
    for _ in range(500):
        if not core.has_work:
            return results
        for update in core.step():
            tokens, reason = results.get((update.request_id, update.index), ([], None))
            assert reason is None, "an update after the end"
            results[update.request_id, update.index] = ([*tokens, *update.token_ids], update.finish_reason)
        core.check_integrity()
    raise AssertionError("500 steps were not enough")


def greedy(prompt, count, vocab=32):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(true_logits(tokens, vocab).argmax()))
    return tokens[len(prompt) :]


LAYOUTS = [{"block_size": 1, "num_blocks": 80}, {"block_size": 4}, {"block_size": 16}, {"block_size": 64}]


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_model_without_a_pool(layout, prefix_cache):
    core = make(prefix_cache=prefix_cache, **layout)
    prompts = {"a": [1, 2, 3], "b": [1, 2, 3, 4, 5, 6], "c": [9], "d": list(range(20)), "e": [1, 2, 3, 4, 5, 6]}
    for name, prompt in prompts.items():
        core.add(request(name, prompt, max_tokens=9))
    results = drain(core)
    assert results == {(name, 0): (greedy(prompt, 9), "length") for name, prompt in prompts.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 62, 63])
def test_lengths_around_block_and_sequence_limits(layout, length):
    core = make(**layout)
    prompt = [i % 7 for i in range(length)]
    core.add(request("r", prompt, max_tokens=30))
    count = min(30, 64 - length)
    assert drain(core) == {("r", 0): (greedy(prompt, count), "length")}


def test_one_token():
    core = make()
    core.add(request("r", [5], max_tokens=1))
    [update] = core.step()
    assert (update.token_ids, update.finish_reason, update.logprobs) == (greedy([5], 1), "length", None)
    assert not core.has_work


def test_end_of_sequence_and_stop_ids():
    first, second, third = greedy([1, 2], 3)
    assert len({first, second, third}) == 3

    def run(eos=(), **params):
        core = make(eos=eos)
        core.add(request("r", [1, 2], max_tokens=3, **params))
        return drain(core)["r", 0]

    assert run(eos=(second,)) == ([first, second], "stop")
    assert run(stop_token_ids=[first]) == ([first], "stop")
    assert run(eos=(second,), ignore_eos=True) == ([first, second, third], "length")
    assert run(eos=(99,), min_tokens=3) == ([first, second, third], "length")  # no such token
    assert run(eos=(third,)) == ([first, second, third], "stop")
    longer, reason = run(eos=(first,), min_tokens=2)
    assert longer[0] != first and len(longer) >= 2 and reason in ("stop", "length")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Request("r", []), "the prompt is empty"),
        (Request("r", np.array([], np.int64)), "the prompt is empty"),
        (Request("r", [1.5]), "the prompt holds something that isn't an integer"),
        (Request("r", ["a"]), "the prompt holds something that isn't an integer"),
        (Request("r", [[1], [2]]), "the prompt holds something that isn't an integer"),
        (Request("r", [[1], 2]), "the prompt holds something that isn't an integer"),
        (Request("r", [2**70]), "the prompt holds something that isn't an integer"),
        (Request("r", [True]), "the prompt holds something that isn't an integer"),
        (Request("r", [3, -1]), "the prompt holds token id -1, expected ids from 0 to 31"),
        (Request("r", [32]), "the prompt holds token id 32, expected ids from 0 to 31"),
        (Request("r", [1] * 64), "the prompt has 64 tokens, expected at most 63"),
        (request("r", [1], stop_token_ids=[32]), "stop_token_ids holds token id 32"),
        (request("r", [1], logit_bias={32: 1}), "logit_bias holds token id 32"),
        (request("r", [1], logprobs=33), "logprobs is 33, expected at most the 32 tokens there are"),
        (request("old", [1]), "request id 'old' is in use"),
    ],
)
def test_bad_requests_are_refused_and_change_nothing(bad, message):
    core = make()
    core.add(request("old", [1, 2], max_tokens=3))
    with pytest.raises(InputError) as caught:
        core.add(bad)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    core.check_integrity()
    assert drain(core) == {("old", 0): (greedy([1, 2], 3), "length")}
    core.add(request("old", [1, 2], max_tokens=3))  # an id is free again once its request ended
    assert drain(core)["old", 0][1] == "length"


def test_a_prompt_larger_than_the_pool_is_refused():
    core = make(num_blocks=4, block_size=4)
    with pytest.raises(InputError, match="17 tokens, expected at most 16"):
        core.add(request("r", [1] * 17))
    core.add(request("r", [1] * 16, max_tokens=1))
    assert drain(core)["r", 0] == (greedy([1] * 16, 1), "length")


def test_a_sequence_that_outgrows_the_pool_ends_with_an_error():
    core = make(num_blocks=4, block_size=4)
    core.add(request("long", [1] * 6, max_tokens=30))
    core.add(request("short", [2, 3], max_tokens=5))
    updates = []
    while core.has_work:
        updates += core.step()
        core.check_integrity()
    last = [update for update in updates if update.request_id == "long"][-1]
    assert last.finish_reason == "error" and "fills the whole KV pool of 16 tokens" in last.error
    tokens = [token for update in updates if update.request_id == "long" for token in update.token_ids]
    assert tokens == greedy([1] * 6, 11)  # the last token needs no room of its own
    assert sum(len(update.token_ids) for update in updates if update.request_id == "short") == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seqs": 0}, "max_num_seqs is 0, expected an integer >= 1"),
        ({"seqs": "4"}, "max_num_seqs is '4', expected an integer >= 1"),
        ({"budget": None}, "max_tokens_per_step is None"),
        ({"budget": 3}, "max_tokens_per_step is 3, expected at least max_num_seqs (4)"),
        ({"budget": 65}, "at most the engine's limit of 64"),
        ({"batching": "magic"}, "batching is 'magic', expected 'inflight' or 'static'"),
    ],
)
def test_bad_sizes_are_refused(given, message):
    with pytest.raises(InputError) as caught:
        make(**given)
    assert message in str(caught.value)


def test_cancel_everywhere():
    core = make(seqs=1)
    core.add(request("running", [1, 2], max_tokens=20))
    core.add(request("waiting", [3], max_tokens=20, n=2))
    core.step()
    core.cancel("waiting")
    core.cancel("running")
    core.cancel("never heard of")
    core.check_integrity()
    assert core.backend.released == [0], "cancelling gives the memory back at once"
    assert core.has_work  # there is something to tell
    with pytest.raises(InputError, match="in use"):
        core.add(request("waiting", [3]))
    results = drain(core)
    assert results == {
        ("running", 0): ([], "cancelled"),
        ("waiting", 0): ([], "cancelled"),
        ("waiting", 1): ([], "cancelled"),
    }
    assert not core.has_work and core.step() == []


def test_cancel_a_preempted_request():
    core = make(num_blocks=4, block_size=4, budget=64)
    core.add(request("old", [1] * 7, max_tokens=6))
    core.add(request("young", [2] * 7, max_tokens=6))
    results = {}
    while not core.stats.total.preemptions:
        for update in core.step():
            results.setdefault(update.request_id, []).extend(update.token_ids)
    core.cancel("young")
    core.check_integrity()
    rest = drain(core)
    assert rest["young", 0] == ([], "cancelled")
    assert results["old"] + rest["old", 0][0] == greedy([1] * 7, 6)
    assert results["young"] == greedy([2] * 7, 6)[: len(results["young"])]


def test_cancel_in_the_step_that_finished_it_comes_too_late():
    core = make()
    core.add(request("r", [1], max_tokens=1))
    assert core.step()[0].finish_reason == "length"
    core.cancel("r")
    core.finish("r", 0, "stop")
    assert not core.has_work and core.step() == []


def test_finish_ends_one_sequence_without_an_update():
    core = make()
    core.add(request("r", [1, 2], max_tokens=6, n=2))
    core.step(), core.step()
    core.finish("r", 0, "stop")
    core.check_integrity()
    results = drain(core)
    assert list(results) == [("r", 1)] and results["r", 1][1] == "length"


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_n_completions_share_the_prompt(layout, prefix_cache):
    core = make(prefix_cache=prefix_cache, **layout)
    prompt = list(range(1, 20))
    core.add(request("r", prompt, n=3, temperature=1.0, seed=5, max_tokens=6))
    results = drain(core)
    for index in range(3):
        single = make(**layout)
        single.add(request("r", prompt, temperature=1.0, seed=5 + index, max_tokens=6))
        assert results["r", index] == drain(single)["r", 0]
    assert len({tuple(tokens) for tokens, _ in results.values()}) == 3
    # The prompt once, and one token of it for each sibling to have logits of.
    assert core.backend.tokens <= 19 + 2 * 1 + 3 * 5
    assert core.stats.total.cached_tokens == 2 * 18


def test_without_a_seed_requests_differ():
    core = make()
    for name in "ab":
        core.add(request(name, [1, 2, 3], temperature=50.0, max_tokens=12))
    results = drain(core)
    assert results["a", 0] != results["b", 0]


def test_prefix_cache_reuses_a_conversation():
    core = make(prefix_cache=True, block_size=64, num_blocks=2)
    prompt = list(range(1, 11))
    core.add(request("one", prompt, max_tokens=5))
    answer = drain(core)["one", 0][0]
    follow = [*prompt, *answer, 3, 3]
    core.add(request("two", follow, max_tokens=5))
    assert drain(core)["two", 0] == (greedy(follow, 5), "length")
    assert core.stats.total.cached_tokens == len(prompt) + 4  # the last token of the answer was never an input
    assert core.backend.copied == 0 and core.backend.released == []


def test_dead_blocks_are_released_at_once():
    core = make(block_size=64, num_blocks=4)
    core.add(request("short", [1], max_tokens=2))
    core.add(request("long", [2], max_tokens=4))
    core.step()
    assert core.backend.released == []
    core.step()
    assert core.backend.released == [0]
    drain(core)
    assert core.backend.released == [0, 1]


def test_a_failing_backend_ends_its_batch_and_nothing_else():
    core = make(seqs=2, prefix_cache=True, fail_at={3})
    for name in ("a", "b", "c"):
        core.add(request(name, [1, 2, 3, 4, 5], max_tokens=6))
    updates = []
    while core.has_work:
        updates += core.step()
        core.check_integrity()
    failed = [update for update in updates if update.finish_reason == "error"]
    assert {update.request_id for update in failed} == {"a", "b"}
    assert failed[0].error == "the backend failed in a step of 2 sequences: RuntimeError: the toy broke"
    # What the failed step had half written isn't used again.
    assert [t for u in updates if u.request_id == "c" for t in u.token_ids] == greedy([1, 2, 3, 4, 5], 6)


def test_logits_of_a_wrong_shape_are_an_error():
    core = make()
    core.backend.execute = lambda batch: np.zeros((len(batch.logits_index), 5), np.float32)
    core.add(request("r", [1]))
    [update] = core.step()
    assert update.finish_reason == "error" and "logits of shape (1, 5), expected (1, 32)" in update.error


def test_broken_logits_end_only_their_sequence():
    core = make(prefix_cache=True)
    execute = core.backend.execute

    def broken(batch):
        logits = execute(batch)
        if core.backend.steps == 2:
            logits[0] = np.nan
        return logits

    core.backend.execute = broken
    core.add(request("bad", [1, 2, 3], max_tokens=5))
    core.add(request("good", [4, 5, 6], max_tokens=5))
    results = drain(core)
    assert results["bad", 0] == (greedy([1, 2, 3], 1), "error")
    assert results["good", 0] == (greedy([4, 5, 6], 5), "length")


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_an_interrupted_step_leaves_the_core_usable(prefix_cache):
    core = make(prefix_cache=prefix_cache)
    execute = core.backend.execute
    core.add(request("gone", [9, 9], max_tokens=5))
    core.add(request("r", [1, 2, 3, 4, 5], max_tokens=5, n=2))
    results = {}
    for update in core.step():
        results[update.request_id, update.index] = (update.token_ids, None)

    def interrupted(batch):
        raise KeyboardInterrupt

    core.backend.execute = interrupted
    core.cancel("gone")
    with pytest.raises(KeyboardInterrupt):
        core.step()
    core.check_integrity()
    core.backend.execute = execute
    drain(core, results)
    assert results["gone", 0] == (greedy([9, 9], 1), "cancelled"), "what was to be told is not lost"
    assert results["r", 0] == results["r", 1] == (greedy([1, 2, 3, 4, 5], 5), "length")


def test_logprobs_travel_with_their_tokens():
    core = make()
    core.add(request("r", [1, 2], max_tokens=3, logprobs=2))
    prompt = [1, 2]
    while core.has_work:
        [update] = core.step()
        [entry] = update.logprobs
        logits = true_logits(prompt, 32).astype(np.float64)
        assert entry.token_id == update.token_ids[0] == entry.top[0][0]
        assert entry.logprob == pytest.approx(logits.max() - np.log(np.exp(logits).sum()), rel=1e-5)
        assert len(entry.top) == 2
        prompt.append(update.token_ids[0])


def test_stats_add_up():
    core = make(budget=8)
    core.add(request("a", [1] * 20, max_tokens=4))
    core.add(request("b", [2], max_tokens=4))
    core.step()
    assert (core.stats.last.prefill_tokens, core.stats.last.decode_tokens, core.stats.last.sequences) == (8, 0, 1)
    drain(core)
    total = core.stats.total
    assert total.prefill_tokens == 21 and total.decode_tokens == 6 and total.steps == core.backend.steps
    assert 0 < total.execute_s < total.step_s
    assert total.preemptions == 0 and total.cached_tokens == 0


def test_static_batching_gives_the_same_tokens_in_more_steps():
    steps = {}
    for batching in ("inflight", "static"):
        core = make(seqs=2, batching=batching)
        for name, count in (("a", 2), ("b", 12), ("c", 12), ("d", 2)):
            core.add(request(name, [len(name), count], max_tokens=count))
        results = drain(core)
        assert all(
            tokens == greedy([1, count], count) for (_, _), (tokens, _) in results.items() for count in [len(tokens)]
        )
        steps[batching] = core.stats.total.steps
    assert steps["static"] == 24 > steps["inflight"] == 14
