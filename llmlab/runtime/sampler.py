"""From logits to tokens."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmlab.runtime.params import SamplingParams
from llmlab.runtime.request import Sequence as SequenceState

GREEDY_BELOW = 1e-5
"""Temperatures below this can't be told from 0 in float32."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, from the model's own logits: no penalty, bias or temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens as (token id, logprob), best first."""


class Sample(NamedTuple):
    """A chosen token; None when the logits hold no finite largest value, which means that the model's math broke."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None


class Sampler:
    """Chooses one token a row. A row's choice depends on its logits, its sequence's tokens and seed, on nothing else.

    Randomness is Philox keyed by (seed, number of output tokens), so a sequence that was preempted, or runs beside
    others, goes on with the numbers that it would have had (Salmon et al. 2011).
    """

    def sample(self, logits: NDArray[np.float32], sequences: Sequence[SequenceState]) -> list[Sample]:
        """`logits` [N, vocab], one row for each of `sequences`; they are not changed."""
        samples = []
        for row, sequence in zip(logits, sequences, strict=True):
            best = int(row.argmax())  # NaN counts as the largest, so one look at the winner finds any
            samples.append(self._sample_row(row, best, sequence) if math.isfinite(row[best]) else Sample(None))
        return samples

    def _sample_row(self, logits: NDArray[np.float32], best: int, sequence: SequenceState) -> Sample:
        params, token = sequence.params, best
        if sequence.adjusts_logits:
            values = adjusted(logits, sequence)
            token = int(values.argmax())
            if not np.isfinite(values[token]):
                return Sample(None)
        else:
            values = logits
        if params.temperature is not None and params.temperature >= GREEDY_BELOW:
            token = draw(values, values[token], params, uniform(sequence.seed, sequence.num_output))
        if params.logprobs is None:
            return Sample(token)
        return Sample(token, token_logprobs(logits, token, params.logprobs))


_PHILOX = np.random.Philox(key=np.zeros(2, np.uint64))
_START = _PHILOX.state
_ONE_AT_A_TIME = threading.Lock()


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides output token `position` of a sequence. float32 holds it exactly."""
    with _ONE_AT_A_TIME:  # a new generator would ask the system for entropy first, which takes twenty times as long
        _START["state"]["key"][:] = seed, position
        _PHILOX.state = _START
        bits = _PHILOX.random_raw()
    return (bits >> 40) * 2.0**-24


def adjusted(logits: NDArray[np.float32], sequence: SequenceState) -> NDArray[np.float32]:
    """A copy of the row [vocab] with the penalties, the bias and the ban of end tokens before min_tokens applied."""
    params, values = sequence.params, logits.copy()
    if params.repetition_penalty != 1.0:
        seen = sequence.tokens[: sequence.num_tokens]
        old = values[seen]
        values[seen] = np.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        ids, counts = np.unique(sequence.output_ids, return_counts=True)
        values[ids] -= (params.presence_penalty + params.frequency_penalty * counts).astype(np.float32)
    if params.logit_bias:
        for token, bias in params.logit_bias.items():
            values[token] += np.float32(bias)
    if sequence.num_output < params.min_tokens:
        values[list(sequence.end_ids)] = -np.inf
    return values


def draw(logits: NDArray[np.float32], peak: np.float32, params: SamplingParams, u: float) -> int:
    """Sample one row [vocab], whose largest value is `peak`, with `u` in [0, 1): temperature, top-k, top-p, min-p.

    Every filter is a least probability, so that equally likely tokens stay or go together. top-p looks at what top-k
    leaves.
    """
    weights = np.subtract(logits, peak)
    weights /= np.float32(params.temperature)
    np.exp(weights, out=weights)  # probabilities but for a factor; the most likely token has 1
    cut = np.float32(params.min_p)
    top_k, top_p = params.top_k or 0, 1.0 if params.top_p is None else params.top_p
    if 0 < top_k < len(weights):
        kept = at_least_kth(weights, top_k)
        cut = max(cut, kept.min())
        if top_p < 1.0:
            cut = max(cut, nucleus_cut(kept, top_p * float(kept.sum(dtype=np.float64))))
    elif top_p < 1.0:
        total = float(weights.sum(dtype=np.float64))
        # All tokens below this together hold less than 1 - top_p, so the nucleus is among the others.
        kept = weights[weights >= np.float32((1.0 - top_p) * total / len(weights))]
        cut = max(cut, nucleus_cut(kept, top_p * total))
    if cut > 0:
        ids = np.flatnonzero(weights >= cut)
        return int(ids[invert(weights[ids], u)])
    return invert(weights, u)


def at_least_kth(values: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """Those of `values` [n] that are not below the k-th largest, k <= n: k of them, and its equals."""
    width = len(values) // 32
    if k <= width:
        # The k-th largest of disjoint groups' maxima is a lower bound, and leaves little to partition.
        maxima = values[: width * 32].reshape(32, width).max(axis=0)
        values = values[values >= np.partition(maxima, width - k)[width - k]]
    return values[values >= np.partition(values, len(values) - k)[len(values) - k]]


def nucleus_cut(weights: NDArray[np.float32], mass: float) -> np.float32:
    """The largest value t of `weights`, none negative, such that those >= t sum up to at least `mass`."""
    # Floats that are not negative sort like their bits: add up by the leading 16, then sort only where mass is reached.
    bins = weights.view(np.int32) >> 16
    low = int(bins.min())
    sums = np.bincount(bins - low, weights=weights)[::-1]
    falling = np.cumsum(sums)
    at = min(int(np.searchsorted(falling, mass)), len(sums) - 1)
    inside = np.sort(weights[bins == low + len(sums) - 1 - at])[::-1]
    reached = (falling[at] - sums[at]) + np.cumsum(inside, dtype=np.float64)
    return inside[min(int(np.searchsorted(reached, mass)), len(inside) - 1)]


def invert(weights: NDArray[np.float32], u: float) -> int:
    """The index where the running sum of `weights` [n] passes the fraction `u` of the whole."""
    width, start = 256, 0
    if len(weights) > 8 * width:  # first find the 256 among which it is
        groups = np.add.reduceat(weights, np.arange(0, len(weights), width), dtype=np.float64)
        sums = np.cumsum(groups)
        target = min(u * sums[-1], np.nextafter(sums[-1], 0.0))
        group = int(np.searchsorted(sums, target, side="right"))
        start = group * width
        weights = weights[start : start + width]
        u = (target - (sums[group] - groups[group])) / groups[group]
    sums = np.cumsum(weights, dtype=np.float64)
    # u * total can round up to total, and the last token might have weight 0.
    target = min(max(u, 0.0) * sums[-1], np.nextafter(sums[-1], 0.0))
    return start + int(np.searchsorted(sums, target, side="right"))


def token_logprobs(logits: NDArray[np.float32], token: int, num_top: int) -> TokenLogprobs:
    """Log probability of `token` and of the `num_top` most likely tokens; `logits` [vocab]."""
    peak = float(logits.max())
    log_total = peak + float(np.log(np.exp(logits - np.float32(peak)).sum(dtype=np.float64)))
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        ids = np.flatnonzero(logits >= at_least_kth(logits, num_top).min())
        ids = ids[np.lexsort((ids, -logits[ids]))][:num_top]
        top = tuple(zip(ids.tolist(), (logits[ids] - log_total).tolist(), strict=True))
    return TokenLogprobs(token, float(logits[token]) - log_total, top)
