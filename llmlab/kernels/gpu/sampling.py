"""The next token of every row of logits: greedy, or drawn with temperature, top-k, top-p and min-p, without a sort.

Four kernels, one behind the other. A row's weights exp((x − peak) / temperature) lie in [0, 1], so as floats they sort like
their 30 low bits: the least weight that top-k or top-p keeps is found ten bits at a time, by histograms of how many tokens
(top-k) or how much weight (top-p) lies above. Weights are added as 64-bit integers, 2^44 for the peak's: exactly, so that no
choice depends on how rows are cut into programs, nor on what runs beside them.
"""

from __future__ import annotations

from llmlab.errors import require

triton = require("triton", "tensorrt")
tl = require("triton.language", "tensorrt")

LOG2E = tl.constexpr(1.4426950408889634)
UNIT = tl.constexpr(17592186044416.0)  # 2^44: the sum of 2^18 of them fits 63 bits
BINS = tl.constexpr(1024)
DIGITS = tl.constexpr(3)  # of ten bits each, in the 30 that a float in [0, 1] uses
GROUPS = tl.constexpr(64)
STATE = tl.constexpr(16)  # numbers a row: (bits, wanted) of each of the six steps, then the bits of the final cut
NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def _tile(logits, row, tile, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """Tokens [TILE] and their logits as float32, -inf past the vocabulary's end."""
    token = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row.to(tl.int64) * VOCAB + token, mask=token < VOCAB, other=float("-inf"))
    return token, x.to(tl.float32)


@triton.jit
def _peak(parts, row, splits, MAX_SPLITS: tl.constexpr):
    split = tl.arange(0, MAX_SPLITS)
    return tl.max(tl.load(parts + row * 2 * MAX_SPLITS + split, mask=split < splits, other=float("-inf")), 0)


@triton.jit
def _weight(x, peak, temperature):
    return tl.exp2((x - peak) * (LOG2E / temperature))


@triton.jit
def _settle(hist, state, row, step, top_p):
    """What a step found: the bits of the least weight to keep, as far as known, and how much is wanted of those that share them."""
    digit = tl.arange(0, BINS)
    counts = tl.load(hist + (row * 2 * DIGITS + step).to(tl.int64) * BINS + digit)
    bits = tl.load(state + row * STATE + 2 * step)
    wanted = tl.load(state + row * STATE + 2 * step + 1)
    if step == DIGITS:  # the first step of top-p: its histogram holds the weight of all
        wanted = tl.maximum(tl.ceil(top_p.to(tl.float64) * tl.sum(counts, 0).to(tl.float64)).to(tl.int64), 1)
    above = tl.cumsum(counts, 0, reverse=True)
    found = tl.max(tl.where(above >= wanted, digit, 0), 0)
    wanted -= tl.sum(tl.where(digit > found, counts, 0), 0)
    return bits + (found.to(tl.int64) << (10 * (DIGITS - 1 - step % DIGITS))), wanted


@triton.jit
def sample_peaks(
    parts,  # f32 [N, 2, MAX_SPLITS]: the largest logit of each split, and the least of its GROUPS groups' largest
    first,  # i32 [N, MAX_SPLITS]: the first token that has the split's largest logit
    hist,  # i64 [N, 6, BINS]: set to 0 where the row is drawn
    logits,  # f32 or f16 [N, VOCAB]
    temperature,  # f32 [N]; 0 is greedy
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Grid (N, splits), splits at most MAX_SPLITS and VOCAB // TILE (but 1): split s has the tiles s, s + splits, …"""
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    best = tl.full([TILE], float("-inf"), tl.float32)
    at = tl.full([TILE], NO_TOKEN, tl.int32)
    for tile in range(split, (VOCAB + TILE - 1) // TILE, splits):
        token, x = _tile(logits, row, tile, VOCAB, TILE)
        x = tl.where(x == x, x, float("inf"))  # NaN is the largest, and as little a number as infinity
        better = x > best
        best = tl.where(better, x, best)
        at = tl.where(better, token, at)
    peak = tl.max(best, 0)
    tl.store(parts + (row * 2) * MAX_SPLITS + split, peak)
    tl.store(
        parts + (row * 2 + 1) * MAX_SPLITS + split, tl.min(tl.max(tl.reshape(best, [GROUPS, TILE // GROUPS]), 1), 0)
    )
    tl.store(first + row * MAX_SPLITS + split, tl.min(tl.where(best == peak, at, NO_TOKEN), 0))
    if tl.load(temperature + row) > 0:
        for step in range(split, 2 * DIGITS, splits):
            place = hist + (row * 2 * DIGITS + step).to(tl.int64) * BINS + tl.arange(0, BINS)
            tl.store(place, tl.full([BINS], 0, tl.int64))


@triton.jit(do_not_specialize=["step"])
def sample_narrow(
    hist,  # i64 [N, 6, BINS]; this step's is added to
    state,  # i64 [N, STATE]; this step's two numbers are written
    logits,
    parts,
    temperature,
    top_k,  # i32 [N]; off where it is not in 1 … VOCAB - 1
    top_p,  # f32 [N]; off from 1 on
    step,  # 0, 1, 2: the digits of top-k's cut, 3, 4, 5: those of top-p's, among what top-k leaves
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Grid (N, splits), once for each step: how much lies in each bin of the next ten bits. Bin 0 needs no count: it is the rest.

    Bin 0 of the first step of top-p takes the weight of all tokens that are too unlikely to be the cut.
    """
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    heat, k, p = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
    cuts_k = (k > 0) & (k < VOCAB)
    by_weight = step >= DIGITS
    if (heat <= 0) | (by_weight & (p >= 1)) | ((not by_weight) & (not cuts_k)):
        return
    peak = _peak(parts, row, splits, MAX_SPLITS)
    if (peak == float("inf")) | (peak == float("-inf")):
        return
    bits, wanted = k.to(tl.int64) * 0, k.to(tl.int64)
    if (step > 0) & ((step != DIGITS) | cuts_k):
        bits, wanted = _settle(hist, state, row, step - 1, p)
    least = 0.0  # the cut is known to be no lower
    kept = bits * 0  # those of the least weight that counts
    if step == 0:
        # As many tokens as there are groups have at least the least of the groups' largest logits.
        if k <= GROUPS * splits:
            s = tl.arange(0, MAX_SPLITS)
            low = tl.load(parts + (row * 2 + 1) * MAX_SPLITS + s, mask=s < splits, other=float("inf"))
            least = _weight(tl.min(low, 0), peak, heat)
    elif step == DIGITS:
        kept = bits
        bits *= 0
        # All tokens below this together hold less than (1 - p), and the peak alone has 1.
        least = (1 - p) * (0.5 / VOCAB)
    if split == 0:
        tl.store(state + row * STATE + 2 * step, bits)
        tl.store(state + row * STATE + 2 * step + 1, wanted)
    shift = 10 * (DIGITS - 1 - step % DIGITS)
    here = bits.to(tl.int32) >> (shift + 10)
    bins = hist + (row * 2 * DIGITS + step).to(tl.int64) * BINS
    for tile in range(split, (VOCAB + TILE - 1) // TILE, splits):
        _, x = _tile(logits, row, tile, VOCAB, TILE)
        weight = _weight(x, peak, heat)
        key = weight.to(tl.int32, bitcast=True)
        digit = (key >> shift) & (BINS - 1)
        amount = tl.where(by_weight, (weight * UNIT).to(tl.int64), 1)
        counted = (key >> (shift + 10) == here) & (key >= kept)
        tl.atomic_add(bins + digit, amount, mask=counted & (weight >= least) & (digit > 0), sem="relaxed")
        if step == DIGITS:
            tl.atomic_add(bins, tl.sum(tl.where(counted & (weight < least), amount, 0), 0), sem="relaxed")


@triton.jit
def sample_weigh(
    mass,  # i64 [N, TILES_PAD]: the weight that is kept in each tile
    state,  # i64 [N, STATE]; the bits of the cut are written
    logits,
    parts,
    hist,
    temperature,
    top_k,
    top_p,
    min_p,  # f32 [N]
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    TILES_PAD: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Grid (N, splits)."""
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    heat, k, p = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
    if heat <= 0:
        return
    peak = _peak(parts, row, splits, MAX_SPLITS)
    if (peak == float("inf")) | (peak == float("-inf")):
        return
    bits = tl.load(min_p + row).to(tl.int32, bitcast=True).to(tl.int64)
    if (p < 1) | ((k > 0) & (k < VOCAB)):
        last = tl.where(p < 1, 2 * DIGITS - 1, DIGITS - 1)
        cut, _ = _settle(hist, state, row, last, p)
        bits = tl.maximum(bits, cut)
    if split == 0:
        tl.store(state + row * STATE + 4 * DIGITS, bits)
    for tile in range(split, (VOCAB + TILE - 1) // TILE, splits):
        _, x = _tile(logits, row, tile, VOCAB, TILE)
        weight = _weight(x, peak, heat)
        kept = tl.where(weight.to(tl.int32, bitcast=True) >= bits, (weight * UNIT).to(tl.int64), 0)
        tl.store(mass + row * TILES_PAD + tile, tl.sum(kept, 0))


@triton.jit
def sample_choose(
    tokens,  # i32 [N]; -1 where the largest logit is not finite
    logits,
    parts,
    first,
    mass,
    state,
    temperature,
    uniform,  # f32 [N], in [0, 1)
    splits,  # of the kernels before
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    TILES_PAD: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Grid (N): greedy rows' first largest logit; for the others, where the running sum passes the fraction `uniform`."""
    row = tl.program_id(0)
    heat = tl.load(temperature + row)
    peak = _peak(parts, row, splits, MAX_SPLITS)
    if (peak == float("inf")) | (peak == float("-inf")):
        tl.store(tokens + row, -1)
    elif heat <= 0:
        split = tl.arange(0, MAX_SPLITS)
        largest = tl.load(parts + row * 2 * MAX_SPLITS + split, mask=split < splits, other=float("-inf")) == peak
        tl.store(tokens + row, tl.min(tl.load(first + row * MAX_SPLITS + split, mask=largest, other=NO_TOKEN), 0))
    else:
        tile = tl.arange(0, TILES_PAD)
        held = tl.load(mass + row * TILES_PAD + tile, mask=tile < (VOCAB + TILE - 1) // TILE, other=0)
        total = tl.sum(held, 0)
        u = tl.load(uniform + row).to(tl.float64)
        target = tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)
        passed = tl.cumsum(held, 0) <= target
        target -= tl.sum(tl.where(passed, held, 0), 0)
        token, x = _tile(logits, row, tl.sum(passed.to(tl.int32), 0), VOCAB, TILE)
        weight = _weight(x, peak, heat)
        cut = tl.load(state + row * STATE + 4 * DIGITS)
        kept = tl.where(weight.to(tl.int32, bitcast=True) >= cut, (weight * UNIT).to(tl.int64), 0)
        tl.store(tokens + row, tl.min(tl.where(tl.cumsum(kept, 0) > target, token, NO_TOKEN), 0))
