"""The sampler against a plain implementation, its statistics, and what its choices must not depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.runtime import sampler as module
from llmlab.runtime.batch import EngineLimits
from llmlab.runtime.params import SamplingParams
from llmlab.runtime.request import Request, expand
from llmlab.runtime.sampler import Sampler, at_least_kth, draw, invert, nucleus_cut, uniform

QUICK = settings(derandomize=True, database=None, deadline=None, max_examples=150)


def sequence(params, prompt=(1, 2), output=(), eos=(), vocab=50):
    limits = EngineLimits(vocab_size=vocab, max_seq_len=400, max_tokens_per_step=8, num_blocks=8, block_size=400)
    request = Request("r", list(prompt), params)
    [made, *_] = expand(request, np.array(prompt), limits=limits, eos_token_ids=frozenset(eos), order=0)
    for token in output:
        made.append(token)
    return made


def random_logits(seed, rows, vocab, scale=2.0):
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * scale).astype(np.float32)


def plain_distribution(logits, params, prompt, output, end_ids):
    """Probabilities of every token, in plain Python floats: what `sample` draws from."""
    values = [float(x) for x in logits]
    for token in set(prompt) | set(output):
        values[token] *= 1 / params.repetition_penalty if values[token] > 0 else params.repetition_penalty
    for token in set(output):
        values[token] -= params.presence_penalty + params.frequency_penalty * list(output).count(token)
    for token, bias in (params.logit_bias or {}).items():
        values[token] += bias
    if len(output) < params.min_tokens:
        for token in end_ids:
            values[token] = -math.inf
    peak = max(values)
    if not params.temperature:
        return [float(i == values.index(peak)) for i in range(len(values))]
    weights = [math.exp((x - peak) / params.temperature) for x in values]
    allowed = set(range(len(weights)))
    if params.top_k:
        worst = sorted(weights, reverse=True)[: params.top_k][-1]
        allowed = {i for i in allowed if weights[i] >= worst}
    if params.top_p is not None and params.top_p < 1:
        total, mass, kept = sum(weights[i] for i in allowed), 0.0, []
        for i in sorted(allowed, key=lambda i: -weights[i]):
            if mass >= params.top_p * total:
                break
            mass += weights[i]
            kept.append(i)
        worst = min(weights[i] for i in kept)
        allowed = {i for i in allowed if weights[i] >= worst}
    allowed = {i for i in allowed if weights[i] >= params.min_p}
    total = sum(weights[i] for i in allowed)
    return [weights[i] / total if i in allowed else 0.0 for i in range(len(weights))]


def plain_choice(probabilities, u):
    mass = 0.0
    for token, p in enumerate(probabilities):
        mass += p
        if mass > u:
            return token
    return max(range(len(probabilities)), key=lambda i: probabilities[i] > 0)


some_params = st.builds(
    SamplingParams,
    min_tokens=st.sampled_from([0, 0, 4]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 7, 49, 50, 500]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.0, 0.1, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -1.0]),
    stop_token_ids=st.sampled_from([(), (3,)]),
    seed=st.integers(0, 2**63 - 1),
    logit_bias=st.sampled_from([None, {4: 100.0}, {4: -100.0, 5: 1.5}]),
)


@QUICK
@given(
    st.lists(st.tuples(some_params, st.lists(st.integers(0, 49), max_size=8)), min_size=1, max_size=6),
    st.integers(0, 1000),
)
def test_equals_the_plain_sampler(rows, data_seed):
    logits = random_logits(data_seed, len(rows), 50)
    before = logits.copy()
    sequences = [sequence(params, (1, 2), output, eos=(0,)) for params, output in rows]
    got = [sample.token_id for sample in Sampler().sample(logits, sequences)]
    assert (logits == before).all()
    for row, (params, output) in enumerate(rows):
        probabilities = plain_distribution(logits[row], params, (1, 2), output, {0, *params.stop_token_ids})
        u = uniform(params.seed, len(output))
        near = {plain_choice(probabilities, min(max(u + nudge, 0.0), 1.0)) for nudge in (-1e-5, 0.0, 1e-5)}
        assert got[row] in near, (params, probabilities[got[row]])


@QUICK
@given(some_params, st.integers(0, 100))
def test_choice_does_not_depend_on_neighbours(params, data_seed):
    logits = random_logits(data_seed, 5, 4096)
    rng = np.random.default_rng(data_seed)
    others = [sequence(SamplingParams(temperature=1.0, seed=int(rng.integers(99))), vocab=4096) for _ in range(4)]
    me = sequence(params, output=(5, 5, 6), vocab=4096)
    alone = Sampler().sample(logits[4:], [me])[0].token_id
    assert Sampler().sample(logits, [*others, me])[4].token_id == alone
    assert Sampler().sample(logits[::-1], [me, *others])[0].token_id == alone


def test_numbers_are_those_of_philox_and_fit_float32():
    for seed, position in [(0, 0), (5, 7), (7, 5), (2**63 - 1 + 3, 10**6)]:
        fresh = np.random.Philox(key=np.array([seed, position], np.uint64)).random_raw()
        assert uniform(seed, position) == np.float32(uniform(seed, position)) == (fresh >> 40) * 2.0**-24


def test_seeds_and_positions_give_different_numbers():
    numbers = [uniform(seed, position) for seed in range(40) for position in range(40)]
    assert len(set(numbers)) == 1600
    assert all(0 <= number < 1 for number in numbers)
    counts = np.histogram(numbers, bins=16, range=(0, 1))[0]
    assert ((counts - 100) ** 2 / 100).sum() < 37.7  # chi-square, 15 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    "values", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 0.5, "top_k": 8, "top_p": 0.9}]
)
def test_frequencies_follow_the_distribution(values):
    params = SamplingParams(**({"temperature": 1.0, "seed": 1} | values))
    logits = random_logits(3, 1, 12)
    probabilities = np.array(plain_distribution(logits[0], params, (), (), ()))
    count, counts = 8000, np.zeros(12)
    for position in range(count):
        counts[draw(logits[0], logits.max(), params, uniform(1, position))] += 1
    likely = probabilities > 0
    assert counts[~likely].sum() == 0
    expected = probabilities[likely] * count
    statistic = ((counts[likely] - expected) ** 2 / expected).sum()
    assert statistic < 31.3  # p = 0.001 at 11 degrees of freedom, the most there are here
    # Control: the test tells these frequencies from those of a temperature that is 10 % off.
    wrong = np.array(plain_distribution(logits[0], SamplingParams(temperature=1.3), (), (), ())) * count
    assert ((counts - wrong) ** 2 / wrong).sum() > 31.3


def test_greedy_rows_do_nothing_but_argmax(monkeypatch):
    def forbidden(*args):
        raise AssertionError("a greedy row drew a number or copied its logits")

    for name in ("draw", "uniform", "adjusted", "token_logprobs"):
        monkeypatch.setattr(module, name, forbidden)
    logits = random_logits(0, 3, 50)
    rows = [sequence(SamplingParams(temperature=t)) for t in (0.0, None, 1e-9)]
    assert [s.token_id for s in Sampler().sample(logits, rows)] == logits.argmax(axis=1).tolist()
    with pytest.raises(AssertionError):
        Sampler().sample(logits, [*rows[:2], sequence(SamplingParams(temperature=1.0))])


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_told_and_only_of_their_row(broken, temperature):
    logits = random_logits(0, 3, 50)
    logits[1, 17] = broken
    rows = [sequence(SamplingParams(temperature=temperature, seed=0)) for _ in range(3)]
    tokens = [sample.token_id for sample in Sampler().sample(logits, rows)]
    assert tokens[1] is None and None not in (tokens[0], tokens[2])


def test_masked_logits_are_fine_until_all_are():
    logits = np.full((2, 50), -np.inf, np.float32)
    logits[0, 9] = -3.0
    rows = [sequence(SamplingParams(temperature=1.0, seed=0)) for _ in range(2)]
    assert [sample.token_id for sample in Sampler().sample(logits, rows)] == [9, None]


def test_min_tokens_keeps_end_tokens_out_until_reached():
    params = SamplingParams(min_tokens=2, stop_token_ids=(8,))
    logits = np.zeros((1, 50), np.float32)
    logits[0, [7, 8, 9]] = [3, 4, 2]

    def choice(output, params=params):
        return Sampler().sample(logits, [sequence(params, output=output, eos=(7,))])[0].token_id

    assert [choice(()), choice((1,)), choice((1, 1))] == [9, 9, 8]
    assert choice((), SamplingParams(min_tokens=2, ignore_eos=True, stop_token_ids=(8,))) == 7


@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("vocab", [30, 33, 4096, 5000])
def test_selection_helpers_equal_sorting(vocab, scale):
    values = random_logits(vocab, 1, vocab, scale)[0]
    values = np.exp(values - values.max())
    falling = np.sort(values)[::-1]
    for k in (1, 2, 20, vocab - 1, vocab):
        assert sorted(at_least_kth(values, k)) == sorted(values[values >= falling[k - 1]])
    sums = np.cumsum(falling, dtype=np.float64)
    for fraction in (0.0, 1e-3, 0.3, 0.9, 0.999999):
        mass = fraction * sums[-1]
        assert nucleus_cut(values, mass) == falling[np.searchsorted(sums, mass)]
    assert values[values >= nucleus_cut(values, sums[-1])].sum(dtype=np.float64) >= sums[-1] * (1 - 1e-12)


def test_ties_stay_together():
    values = np.array([0.5, 1.0, 0.5, 0.25, 0.5], np.float32)
    assert sorted(at_least_kth(values, 2)) == [0.5, 0.5, 0.5, 1.0]
    assert nucleus_cut(values, 1.2) == 0.5


@pytest.mark.parametrize("vocab", [5, 5000])
def test_inverse_distribution_never_returns_a_token_without_weight(vocab):
    weights = np.zeros(vocab, np.float32)
    weights[[1, vocab - 3]] = [1e-30, 1.0]
    last = np.nextafter(1.0, 0.0)
    assert [invert(weights, u) for u in (0.0, 1e-20, 0.5, last)] == [1, vocab - 3, vocab - 3, vocab - 3]
    steps = np.ones(vocab, np.float32)
    assert [invert(steps, (i + 0.5) / vocab) for i in range(vocab)] == list(range(vocab))


def test_logprobs_are_of_the_raw_logits():
    logits = random_logits(5, 2, 5000)
    params = SamplingParams(temperature=0.3, top_k=2, seed=4, logprobs=3, logit_bias={7: 100.0})
    rows = [sequence(params), sequence(SamplingParams(logprobs=0))]
    biased, greedy = Sampler().sample(logits, rows)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    assert biased.token_id == biased.logprobs.token_id == 7
    assert biased.logprobs.logprob == pytest.approx(exact[0, 7], rel=1e-5)
    best = np.argsort(-exact[0])[:3]
    assert [token for token, _ in biased.logprobs.top] == best.tolist()
    assert [value for _, value in biased.logprobs.top] == pytest.approx(exact[0, best].tolist(), rel=1e-5)
    assert greedy.logprobs.top == () and greedy.logprobs.logprob == pytest.approx(exact[1].max(), rel=1e-5)
    assert Sampler().sample(logits, [sequence(SamplingParams())] * 2)[0].logprobs is None
