"""Values of a quantized pool, two a 16-bit word, as float16: exact for int8 and float8_e4m3fn.

The tensor cores want neighbouring keys of one channel side by side, and values lie in the pool with neighbouring channels side by
side. Shared memory can be read transposed in words of 16 bits, not of 8: so a pool is read as words, and a word's two channels go to
two tiles, of even and of odd channels.
"""

from __future__ import annotations

from llmlab.errors import require

triton = require("triton", "tensorrt")
tl = require("triton.language", "tensorrt")

COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)
"""The interpreter knows no assembly; the other way to write it is as exact, and costs two to three times the instructions."""


@triton.jit
def as_words(pool):
    """A pointer to int8 or float8 as one to words of two of them."""
    return pool.to(tl.pointer_type(tl.int16), bitcast=True)


@triton.jit
def unpack(words, FLOAT8: tl.constexpr):
    """Words int16 [...] → what their low bytes and what their high bytes are worth, float16 [...] each."""
    if FLOAT8:
        if COMPILED:
            low, high = tl.inline_asm_elementwise(
                """{
                .reg .b32 a, b;
                .reg .b16 c, d;
                prmt.b32 a, $2, 0, 0x4420;
                prmt.b32 b, $2, 0, 0x4431;
                cvt.u16.u32 c, a;
                cvt.u16.u32 d, b;
                cvt.rn.f16x2.e4m3x2 $0, c;
                cvt.rn.f16x2.e4m3x2 $1, d;
                }""",
                "=r,=r,r",
                [words],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:  # the bits of e4m3 in those of float16, whose exponents count from 8 less
            low = (((words & 0x7F) << 7) | ((words & 0x80) << 8)).to(tl.float16, bitcast=True) * 256.0
            high = (((words >> 1) & 0x3F80) | (words & -32768)).to(tl.float16, bitcast=True) * 256.0
    else:  # a byte with its sign bit turned counts from −128 on: in the last bits of 1024, which float16 has ten of
        if COMPILED:
            low, high = tl.inline_asm_elementwise(
                """{
                .reg .b32 a, b, bias;
                mov.b32 bias, 0xe480e480;
                lop3.b32 a, $2, 0x00ff00ff, 0x64806480, 0x6a;
                prmt.b32 b, $2, 0x64646464, 0x4341;
                xor.b32 b, b, 0x00800080;
                add.rn.f16x2 $0, a, bias;
                add.rn.f16x2 $1, b, bias;
                }""",
                "=r,=r,r",
                [words],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            low = ((words & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
            high = (((words >> 8) & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    return low, high
