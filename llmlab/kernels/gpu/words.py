"""What the words of quantized weights hold: their integers as floats, and sums of products of four at once."""

from __future__ import annotations

from llmlab.errors import require
from llmlab.kernels.gpu.unpack import COMPILED, unpack

triton = require("triton", "tensorrt")
tl = require("triton.language", "tensorrt")


@triton.jit
def add_four(total, a, b):
    """total + a · b of words of four int8 each, as int32."""
    if COMPILED:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        total += (a >> 24) * (b >> 24)
        for n in tl.static_range(3):
            total += ((a << (24 - 8 * n)) >> 24) * ((b << (24 - 8 * n)) >> 24)
    return total


@triton.jit
def unpacked(words, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The integers of words of 16 bits, as 16-bit floats: a tile for each place in a word."""
    kind: tl.constexpr = tl.float16 if DTYPE == "float16" else tl.bfloat16
    if BITS == 8:
        if DTYPE == "float16":
            low, high = unpack(words, False)
        else:
            low, high = ((words << 8) >> 8).to(kind), (words >> 8).to(kind)
        tiles = (low, high)
    else:
        if (
            COMPILED and DTYPE == "float16"
        ):  # in the last bits of 1024, or sixteen times in those before, the sign flipped
            a, b, c, d = tl.inline_asm_elementwise(
                """{
                .reg .b32 a, b, c, d, high, one, ten, less;
                mov.b32 one, 0xe408e408;
                mov.b32 ten, 0x2c002c00;
                mov.b32 less, 0xd480d480;
                shr.u32 high, $4, 8;
                lop3.b32 a, $4, 0x000f000f, 0x64086408, 0x6a;
                lop3.b32 b, $4, 0x00f000f0, 0x64806480, 0x6a;
                lop3.b32 c, high, 0x000f000f, 0x64086408, 0x6a;
                lop3.b32 d, high, 0x00f000f0, 0x64806480, 0x6a;
                add.rn.f16x2 $0, a, one;
                fma.rn.f16x2 $1, b, ten, less;
                add.rn.f16x2 $2, c, one;
                fma.rn.f16x2 $3, d, ten, less;
                }""",
                "=r,=r,=r,=r,r",
                [words],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            a, b = ((words << 12) >> 12).to(kind), ((words << 8) >> 12).to(kind)
            c, d = ((words << 4) >> 12).to(kind), (words >> 12).to(kind)
        tiles = (a, b, c, d)
    return tiles
