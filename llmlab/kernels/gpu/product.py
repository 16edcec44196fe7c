"""Products x · Wᵀ of linear layers with weights of 16, 8 or 4 bits, their bias, gate and residual fused.

Weights of 8 and 4 bits beside x of 16 bits are read as words of 16 bits, of several columns each (`kernels/packing.py`): every other
8 columns of x are multiplied by the words' low bits, the next 8 by the bits above. Sums are float32, of int8 by int8 int32.
"""

from __future__ import annotations

from llmlab.errors import require
from llmlab.kernels.gpu.common import start_early
from llmlab.kernels.gpu.words import add_four, unpacked

triton = require("triton", "tensorrt")
tl = require("triton.language", "tensorrt")


@triton.jit
def _activate(x, GATE: tl.constexpr):
    if GATE == "silu":
        x = x * tl.sigmoid(x)
    elif GATE == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif GATE == "gelu_tanh":  # 0.5 (1 + tanh y) = sigmoid(2 y)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif GATE == "relu":
        x = tl.where(x < 0, 0.0, x)  # NaN stays
    return x


@triton.jit
def _finish(value, other, bias, at, width, GATE: tl.constexpr, BIAS: tl.constexpr, mask):
    """Bias and gate of sums of columns `at`; `other` is what the gate multiplies."""
    if BIAS:
        value += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
        if GATE != "":
            other += tl.load(bias + width + at, mask=mask, other=0.0).to(tl.float32)
    if GATE != "":
        value = _activate(value, GATE) * other
    return value


@triton.jit
def _total(parts):
    return tl.sum(tl.sum(parts, 1), 0).to(tl.float32)


@triton.jit
def product_rows(
    out,  # [rows, width]
    x,  # [rows, depth], rows `x_stride` elements apart; int8 read as i32 where INTEGERS
    x_scale,  # f32 [rows]; read where INTEGERS
    weight,  # [outputs, depth] of 16 bits, or i16 [outputs, depth · BITS / 16]; int8 read as i32 where INTEGERS
    scale,  # f16 [outputs] where SCALED, [outputs, depth / GROUP] where GROUP
    bias,  # [outputs]; read where BIAS
    add,  # [rows, width]; read where ADD
    rows,
    depth,
    width,
    x_stride,
    ROWS: tl.constexpr,  # of out that a program has
    COLUMNS: tl.constexpr,  # of out that a program has
    THREADS: tl.constexpr,  # 16-byte reads of a row of W at once
    BITS: tl.constexpr,
    INTEGERS: tl.constexpr,  # whether x and W are int8 and multiplied as such
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,  # whether each column of out has a scale
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    DTYPE: tl.constexpr,
    EARLY: tl.constexpr = False,  # see `start_early`
):
    """Grid (columns / COLUMNS, rows / ROWS). Every thread sums its own part of each dot product; the parts are added at the end."""
    first, first_row = tl.program_id(0) * COLUMNS, tl.program_id(1) * ROWS
    HALVES: tl.constexpr = 1 if GATE == "" else 2
    PLACES: tl.constexpr = 4 if INTEGERS else 16 // BITS  # values a word
    WORDS: tl.constexpr = 4 if INTEGERS else 8  # of a thread, 16 bytes together
    TILES: tl.constexpr = 1 if INTEGERS else PLACES  # of x, for one of words
    X_PLACES: tl.constexpr = PLACES if INTEGERS else 1
    sums = (tl.zeros([THREADS, WORDS], tl.int32 if INTEGERS else tl.float32),) * (ROWS * COLUMNS * HALVES)
    thread = tl.arange(0, THREADS)
    start_early(EARLY)
    for start in range(0, depth, THREADS * WORDS * PLACES):
        at = start + thread * (WORDS * PLACES)
        inside = (at < depth)[:, None]
        place = at[:, None] // PLACES + tl.arange(0, WORDS)[None]
        x_place = at[:, None] // X_PLACES + tl.arange(0, WORDS)[None]
        weights = ()
        scales = ()
        for c in tl.static_range(COLUMNS * HALVES):
            row = (tl.minimum(first + c // HALVES, width - 1) + (c % HALVES) * width).to(tl.int64)
            line = weight + row * (depth // (WORDS * PLACES) * WORDS)  # so written, its alignment is known
            weights = weights + (tl.load(line + place, mask=inside, other=0, eviction_policy="evict_first"),)
            if GROUP > 0:
                line = scale + row * (depth // GROUP)
                scales = scales + (tl.load(line + at // GROUP, mask=at < depth, other=0.0).to(tl.float32),)
        new = ()
        for r in tl.static_range(ROWS):
            line = x + tl.minimum(first_row + r, rows - 1).to(tl.int64) * (x_stride // X_PLACES)
            values = ()
            for n in tl.static_range(TILES):
                values = values + (tl.load(line + x_place + n * WORDS, mask=inside, other=0),)
            for c in tl.static_range(COLUMNS * HALVES):
                total = sums[r * COLUMNS * HALVES + c]
                if INTEGERS:
                    total = add_four(total, values[0], weights[c])
                elif BITS == 16:
                    total += values[0].to(tl.float32) * weights[c].to(tl.float32)
                else:
                    tiles = unpacked(weights[c], BITS, DTYPE)
                    part = tl.zeros_like(total) if GROUP > 0 else total
                    for n in tl.static_range(TILES):
                        part += values[n].to(tl.float32) * tiles[n].to(tl.float32)
                    total = total + part * scales[c][:, None] if GROUP > 0 else part
                new = new + (total,)
        sums = new
    for r in tl.static_range(ROWS):
        row = first_row + r
        for c in tl.static_range(COLUMNS):
            column = first + c
            real = (row < rows) & (column < width)
            value = _total(sums[(r * COLUMNS + c) * HALVES])
            other = _total(sums[(r * COLUMNS + c) * HALVES + HALVES - 1])
            if INTEGERS:
                s = tl.load(x_scale + row, mask=real, other=0.0)
                value *= s
                other *= s
            if SCALED:
                value *= tl.load(scale + column, mask=real, other=0.0).to(tl.float32)
                if GATE != "":
                    other *= tl.load(scale + width + column, mask=real, other=0.0).to(tl.float32)
            value = _finish(value, other, bias, column, width, GATE, BIAS, real)
            to = row.to(tl.int64) * width + column
            if ADD:
                value += tl.load(add + to, mask=real, other=0.0).to(tl.float32)
            tl.store(out + to, value.to(out.dtype.element_ty), mask=real)


@triton.jit
def _add_product(total, x, w, TILES: tl.constexpr, DTYPE: tl.constexpr, SWAP: tl.constexpr):
    """total + x · wᵀ, x [BLOCK_ROWS, BLOCK_DEPTH] in TILES tiles and w [BLOCK_COLUMNS, BLOCK_DEPTH]; transposed with SWAP."""
    tiles = (w,) if TILES == 1 else unpacked(w, 16 // TILES, DTYPE)
    for n in tl.static_range(TILES):
        if SWAP:
            total = tl.dot(tiles[n], tl.trans(x[n]), total, out_dtype=total.dtype)
        else:
            total = tl.dot(x[n], tl.trans(tiles[n]), total, out_dtype=total.dtype)
    return total


@triton.jit
def product_tiles(
    out,  # [rows, width]
    x,  # [rows, depth], rows `x_stride` elements apart; int8 where INTEGERS
    x_scale,  # f32 [rows]; read where INTEGERS
    weight,  # [outputs, depth] of 16 bits or of int8, or i16 [outputs, depth · BITS / 16]
    scale,  # f16 [outputs] where SCALED, [outputs, depth / GROUP] where GROUP
    bias,  # [outputs]; read where BIAS
    add,  # [rows, width]; read where ADD
    rows,
    depth,
    width,
    x_stride,
    BLOCK_ROWS: tl.constexpr,  # of out that a program has
    BLOCK_COLUMNS: tl.constexpr,  # of out that a program has
    BLOCK_DEPTH: tl.constexpr,  # columns of x and W that are multiplied at once; no more than GROUP
    SWAP: tl.constexpr,  # whether W's tile is the tensor cores' left operand
    TOGETHER: tl.constexpr,  # row tiles whose programs run side by side
    BITS: tl.constexpr,
    INTEGERS: tl.constexpr,  # whether x and W are int8 and multiplied as such
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,  # whether each column of out has a scale
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    DTYPE: tl.constexpr,
    EARLY: tl.constexpr = False,  # see `start_early`
):
    """Grid (row tiles · column tiles), in an order that reads the same weights at about the same time."""
    TILES: tl.constexpr = 1 if INTEGERS else 16 // BITS  # of x, for one of W
    SHAPE: tl.constexpr = [BLOCK_COLUMNS, BLOCK_ROWS] if SWAP else [BLOCK_ROWS, BLOCK_COLUMNS]
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(width, BLOCK_COLUMNS)
    program = tl.program_id(0)
    together = TOGETHER * column_tiles
    first = program // together * TOGETHER
    count = tl.minimum(row_tiles - first, TOGETHER)
    row = (first + program % together % count) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = program % together // count * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    place = tl.arange(0, BLOCK_DEPTH // TILES)
    block = place if TILES == 1 else place // 8 * (8 * TILES)
    x_place = place if TILES == 1 else block + place % 8
    x_lines = x + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * x_stride + x_place[None]
    output = tl.minimum(column, width - 1).to(tl.int64)
    length = depth if TILES == 1 else depth // (8 * TILES) * 8  # of a line of W; so written, its alignment is known
    lines = weight + output[:, None] * length + place[None]
    others = lines + width.to(tl.int64) * length
    start_early(EARLY)
    value = tl.zeros(SHAPE, tl.int32 if INTEGERS else tl.float32)
    other = value
    if GROUP > 0:
        scales = scale + output * (depth // GROUP)
        other_scales = scales + width.to(tl.int64) * (depth // GROUP)
        s = tl.load(scales)
        other_s = tl.load(other_scales) if GATE != "" else s
    for start in range(0, depth, BLOCK_DEPTH):
        inside = (start + block < depth)[None]
        a = ()
        for n in tl.static_range(TILES):
            a = a + (tl.load(x_lines + start + 8 * n, mask=inside, other=0),)
        w = tl.load(lines + start // TILES, mask=inside, other=0, eviction_policy="evict_first")
        if GROUP > 0:  # the next step's scales are on their way during this one's product
            part = _add_product(tl.zeros(SHAPE, tl.float32), a, w, TILES, DTYPE, SWAP)
            factor = s.to(tl.float32)
            value += part * (factor[:, None] if SWAP else factor[None])
            following = tl.minimum(start + BLOCK_DEPTH, depth - BLOCK_DEPTH) // GROUP
            s = tl.load(scales + following)
        else:
            value = _add_product(value, a, w, TILES, DTYPE, SWAP)
        if GATE != "":
            w = tl.load(others + start // TILES, mask=inside, other=0, eviction_policy="evict_first")
            if GROUP > 0:
                part = _add_product(tl.zeros(SHAPE, tl.float32), a, w, TILES, DTYPE, SWAP)
                factor = other_s.to(tl.float32)
                other += part * (factor[:, None] if SWAP else factor[None])
                other_s = tl.load(other_scales + following)
            else:
                other = _add_product(other, a, w, TILES, DTYPE, SWAP)
    if SWAP:
        value, other = tl.trans(value), tl.trans(other)
    value, other = value.to(tl.float32), other.to(tl.float32)
    column, row = column[None], row[:, None]
    there = column < width
    if INTEGERS:
        s = tl.load(x_scale + row, mask=row < rows, other=0.0)
        value *= s
        other *= s
    if SCALED:
        value *= tl.load(scale + column, mask=there, other=0.0).to(tl.float32)
        if GATE != "":
            other *= tl.load(scale + width + column, mask=there, other=0.0).to(tl.float32)
    value = _finish(value, other, bias, column, width, GATE, BIAS, there)
    real = there & (row < rows)
    to = row.to(tl.int64) * width + column
    if ADD:
        value += tl.load(add + to, mask=real, other=0.0).to(tl.float32)
    tl.store(out + to, value.to(out.dtype.element_ty), mask=real)
