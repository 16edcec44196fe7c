"""Products x · Wᵀ of linear layers with weights of 16, 8 or 4 bits, their bias, gate and residual fused. Sums are float32."""

from __future__ import annotations

from llmlab.errors import require

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
def _values_of(word, PLACE: tl.constexpr, BITS: tl.constexpr):
    """The integer number PLACE of a word of four, as float32: its bits become the last ones of a large float's fraction.

    A sign bit that is flipped makes the integer positive, and what that and the large float add is taken away, exactly.
    """
    shift: tl.constexpr = 4 * PLACE if BITS == 4 else 8 * (PLACE % 2)
    sign: tl.constexpr = 1 << (BITS - 1)
    large: tl.constexpr = (150 - shift) << 23  # 2^(23 - shift)
    bits = word.to(tl.int32) if BITS == 4 else word >> (16 * (PLACE // 2))
    bits = (bits & ((2 * sign - 1) << shift)) ^ (large | (sign << shift))
    return bits.to(tl.float32, bitcast=True) - (2.0 ** (23 - shift) + sign)


@triton.jit
def _float_of(word, PLACE: tl.constexpr, DTYPE: tl.constexpr):
    """The 16-bit float number PLACE of a 64-bit word, as float32."""
    half = (word >> (32 * (PLACE // 2))).to(tl.int32)
    if DTYPE == "bfloat16":
        return ((half << 16) if PLACE % 2 == 0 else (half & -65536)).to(tl.float32, bitcast=True)
    return (half >> (16 * (PLACE % 2))).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


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
def product_rows(
    out,  # [rows, width]
    x,  # [rows, depth], rows `x_stride` elements apart; read as i64 where BITS < 16
    weight,  # [outputs, depth] of 16 bits, or as i32 for int8 and as i16 for int4
    scale,  # f16 [outputs], or [outputs, depth / GROUP]; read where BITS < 16
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
    GROUP: tl.constexpr,
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Grid (columns / COLUMNS, rows / ROWS). Every thread sums its own part of each dot product; the parts are added at the end."""
    first, first_row = tl.program_id(0) * COLUMNS, tl.program_id(1) * ROWS
    HALVES: tl.constexpr = 1 if GATE == "" else 2
    PACKED: tl.constexpr = 1 if BITS == 16 else 4  # values a word
    WORDS: tl.constexpr = 4 if BITS == 8 else 8  # a thread's, of 16 bytes together
    sums = (tl.zeros([THREADS], tl.float32),) * (ROWS * COLUMNS * HALVES)
    thread = tl.arange(0, THREADS)
    for start in range(0, depth, THREADS * WORDS * PACKED):
        at = start + thread * (WORDS * PACKED)
        inside = (at < depth)[:, None]
        place = at[:, None] // PACKED + tl.arange(0, WORDS)[None]
        weights = ()
        scales = ()
        for c in tl.static_range(COLUMNS * HALVES):
            row = tl.minimum(first + c // HALVES, width - 1) + (c % HALVES) * width
            line = weight + row.to(tl.int64) * (depth // (WORDS * PACKED) * WORDS)  # so written, its alignment is known
            weights = weights + (tl.load(line + place, mask=inside, other=0, eviction_policy="evict_first"),)
            if GROUP > 0:
                line = scale + row.to(tl.int64) * (depth // GROUP)
                scales = scales + (tl.load(line + at // GROUP, mask=at < depth, other=0.0).to(tl.float32),)
        new = ()
        for r in tl.static_range(ROWS):
            row = tl.minimum(first_row + r, rows - 1).to(tl.int64)
            words = tl.load(x + row * (x_stride // PACKED) + place, mask=inside, other=0)
            for c in tl.static_range(COLUMNS * HALVES):
                if BITS == 16:
                    part = words.to(tl.float32) * weights[c].to(tl.float32)
                else:
                    part = _float_of(words, 0, DTYPE) * _values_of(weights[c], 0, BITS)
                    for n in tl.static_range(1, PACKED):
                        part += _float_of(words, n, DTYPE) * _values_of(weights[c], n, BITS)
                part = tl.sum(part, 1)
                if GROUP > 0:
                    part *= scales[c]
                new = new + (sums[r * COLUMNS * HALVES + c] + part,)
        sums = new
    for r in tl.static_range(ROWS):
        row = first_row + r
        for c in tl.static_range(COLUMNS):
            column = first + c
            real = (row < rows) & (column < width)
            value = tl.sum(sums[(r * COLUMNS + c) * HALVES], 0)
            other = tl.sum(sums[(r * COLUMNS + c) * HALVES + HALVES - 1], 0)
            if BITS < 16 and GROUP == 0:
                value *= tl.load(scale + column, mask=real, other=0.0).to(tl.float32)
                if GATE != "":
                    other *= tl.load(scale + width + column, mask=real, other=0.0).to(tl.float32)
            value = _finish(value, other, bias, column, width, GATE, BIAS, real)
            to = row.to(tl.int64) * width + column
            if ADD:
                value += tl.load(add + to, mask=real, other=0.0).to(tl.float32)
            tl.store(out + to, value.to(out.dtype.element_ty), mask=real)


@triton.jit
def _multiply(x, w, DTYPE: tl.constexpr, BITS: tl.constexpr, SWAP: tl.constexpr):
    """x [BLOCK_ROWS, BLOCK_DEPTH] · w [BLOCK_COLUMNS, BLOCK_DEPTH]ᵀ, or the transpose of that with SWAP.

    With 4 bits both come in pairs along the depth: x as i32, w as i8. Even and odd columns are multiplied apart.
    """
    kind: tl.constexpr = tl.float16 if DTYPE == "float16" else tl.bfloat16
    if BITS == 4:
        even = x.to(tl.int16).to(kind, bitcast=True)
        odd = (x >> 16).to(tl.int16).to(kind, bitcast=True)
        low, high = ((w << 4) >> 4).to(kind), (w >> 4).to(kind)
        if SWAP:
            product = tl.dot(high, tl.trans(odd), tl.dot(low, tl.trans(even)))
        else:
            product = tl.dot(odd, tl.trans(high), tl.dot(even, tl.trans(low)))
    else:
        w = w.to(kind)
        product = tl.dot(w, tl.trans(x)) if SWAP else tl.dot(x, tl.trans(w))
    return product


@triton.jit
def product_tiles(
    out,  # [rows, width]
    x,  # [rows, depth], rows `x_stride` elements apart; read as i32 where BITS is 4
    weight,  # [outputs, depth] of 16 bits or i8, [outputs, depth / 2] of i8 where BITS is 4
    scale,  # f16 [outputs], or [outputs, depth / GROUP]; read where BITS < 16
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
    GROUP: tl.constexpr,
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Grid (row tiles · column tiles), in an order that reads the same weights at about the same time."""
    PACKED: tl.constexpr = 2 if BITS == 4 else 1  # values that lie together
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(width, BLOCK_COLUMNS)
    program = tl.program_id(0)
    together = TOGETHER * column_tiles
    first = program // together * TOGETHER
    count = tl.minimum(row_tiles - first, TOGETHER)
    row = (first + program % together % count) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = program % together // count * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    place = tl.arange(0, BLOCK_DEPTH // PACKED)
    x_lines = x + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * (x_stride // PACKED) + place[None]
    output = tl.minimum(column, width - 1).to(tl.int64)
    length = depth // (16 * PACKED) * 16  # of a line of W; so written, its alignment is known
    lines = weight + output[:, None] * length + place[None]
    others = lines + width.to(tl.int64) * length
    value = tl.zeros([BLOCK_COLUMNS, BLOCK_ROWS] if SWAP else [BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    other = value
    if GROUP > 0:
        scales = scale + output * (depth // GROUP)
        other_scales = scales + width.to(tl.int64) * (depth // GROUP)
        s = tl.load(scales)
        other_s = tl.load(other_scales) if GATE != "" else s
    for start in range(0, depth, BLOCK_DEPTH):
        if BITS == 4:
            inside = (start + place // 16 * 32 < depth)[None]  # 16 bytes are there, or none of them
        else:
            inside = (start + place < depth)[None]
        a = tl.load(x_lines + start // PACKED, mask=inside, other=0)
        w = tl.load(lines + start // PACKED, mask=inside, other=0, eviction_policy="evict_first")
        part = _multiply(a, w, DTYPE, BITS, SWAP)
        if GROUP > 0:  # the next step's scales are on their way during this one's product
            factor = s.to(tl.float32)
            part *= factor[:, None] if SWAP else factor[None]
            following = tl.minimum(start + BLOCK_DEPTH, depth - BLOCK_DEPTH) // GROUP
            s = tl.load(scales + following)
        value += part
        if GATE != "":
            w = tl.load(others + start // PACKED, mask=inside, other=0, eviction_policy="evict_first")
            part = _multiply(a, w, DTYPE, BITS, SWAP)
            if GROUP > 0:
                factor = other_s.to(tl.float32)
                part *= factor[:, None] if SWAP else factor[None]
                other_s = tl.load(other_scales + following)
            other += part
    if SWAP:
        value, other = tl.trans(value), tl.trans(other)
    column, row = column[None], row[:, None]
    there = column < width
    if BITS < 16 and GROUP == 0:
        value *= tl.load(scale + column, mask=there, other=0.0).to(tl.float32)
        if GATE != "":
            other *= tl.load(scale + width + column, mask=there, other=0.0).to(tl.float32)
    value = _finish(value, other, bias, column, width, GATE, BIAS, there)
    real = there & (row < rows)
    to = row.to(tl.int64) * width + column
    if ADD:
        value += tl.load(add + to, mask=real, other=0.0).to(tl.float32)
    tl.store(out + to, value.to(out.dtype.element_ty), mask=real)
