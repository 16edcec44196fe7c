"""How a kernel is cut into programs: tile sizes, warps, splits and grids. Plain integers, no GPU library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from llmlab.errors import InputError

QUANTIZED_POOLS = ("int8", "float8_e4m3fn")
MOST_SPLITS = 64
"""Programs that share a sequence's keys, at most; a power of two."""


def power_of_two(n: int, at_least: int = 1) -> int:
    """The smallest power of two that is not under `n` or `at_least`."""
    return max(at_least, 1 << max(0, n - 1).bit_length())


@dataclass(frozen=True)
class AttentionKind:
    """What is fixed about one attention layer when its kernels are compiled."""

    num_heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    quantized: bool = False
    """Whether the pool is int8 or fp8, with one scale per KV head for keys and one for values."""

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.num_heads // self.kv_heads

    def _common(self) -> dict[str, Any]:
        return {
            "KV_HEADS": self.kv_heads,
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "DIM_PAD": power_of_two(self.head_dim, 16),
            "BLOCK_SIZE": self.block_size,
            "WINDOW": self.window,
            "SOFTCAP": self.softcap,
            "ALIBI": self.alibi,
            "SINKS": self.sinks,
            "QUANTIZED": self.quantized,
        }


@dataclass(frozen=True)
class Launch:
    """One kernel's compile-time constants, its compiler options and its grid."""

    constants: dict[str, Any]
    options: dict[str, int]
    grid: tuple[int, ...]


@dataclass(frozen=True)
class AttentionVariant:
    """A layer's kernels as they are compiled: its kind, the types of its tensors, and how many channels of a head turn.

    dtype: float16 or bfloat16, of q, k, v and the result. kv_dtype: of the pool; dtype, or int8 or float8_e4m3fn where the kind is quantized.
    """

    kind: AttentionKind
    dtype: str = "float16"
    kv_dtype: str = "float16"
    rotary: int = 0
    interleaved: bool = False

    def __post_init__(self) -> None:
        pools = QUANTIZED_POOLS if self.kind.quantized else (self.dtype,)
        if self.dtype not in ("float16", "bfloat16") or self.kv_dtype not in pools:
            raise InputError(
                f"attention in {self.dtype} over a KV pool of {self.kv_dtype}: expected float16 or bfloat16, and a pool of "
                f"{' or '.join(pools)}"
            )
        if self.kind.quantized and self.kind.head_dim % 2:
            raise InputError(
                f"a KV pool of {self.kv_dtype} holds heads of an even number of channels, not {self.kind.head_dim}: "
                "leave the KV cache as it is"
            )

    def write(self, tokens: int) -> Launch:
        return write(self.kind, tokens, rotary=self.rotary, interleaved=self.interleaved)

    def constants(self, launch: Launch) -> dict[str, Any]:
        """What tells this variant's compiled kernel from others of its name."""
        return {**launch.constants, "DTYPE": self.dtype, "KV_DTYPE": self.kv_dtype}


def decode_splits(kind: AttentionKind, batch: int, longest: int, multiprocessors: int) -> int:
    """Programs that share a sequence's keys: two a multiprocessor over the whole grid, none with fewer than 256 keys."""
    wanted = 2 * multiprocessors // max(1, batch * kind.kv_heads)
    seen = min(longest, kind.window) if kind.window else longest
    return max(1, min(wanted, MOST_SPLITS, -(-seen // 256)))


def decode(kind: AttentionKind, batch: int, splits: int) -> Launch:
    """`paged_decode` for `batch` sequences of one new token each."""
    wide = kind.head_dim > 128
    constants = {
        **kind._common(),
        "GROUP_PAD": power_of_two(kind.group, 16),
        "DIM_PAD": power_of_two(kind.head_dim, 32 if kind.quantized else 16),
        "TILE": 64 if wide else 128,
        "SPLIT": splits > 1,
    }
    return Launch(constants, {"num_warps": 4, "num_stages": 3}, (batch, kind.kv_heads, splits))


def merge(kind: AttentionKind, batch: int) -> Launch:
    """`merge_splits` behind a `decode` with more than one split."""
    constants = {
        "NUM_HEADS": kind.num_heads,
        "HEAD_DIM": kind.head_dim,
        "DIM_PAD": power_of_two(kind.head_dim, 16),
        "MOST": MOST_SPLITS,
        "SINKS": kind.sinks,
    }
    return Launch(constants, {"num_warps": 4, "num_stages": 1}, (batch, kind.num_heads))


def prefill(kind: AttentionKind, tokens: int, batch: int, *, decodes: bool) -> Launch:
    """`paged_prefill` for `tokens` new tokens of `batch` sequences; `decodes`: those with a single one too."""
    # Few rows a sequence: a large tile would be mostly empty. Where decodes are done elsewhere, what is left has more of them.
    small = tokens * kind.group <= (16 if decodes else 4) * batch
    rows = max(16 if small else 128 if kind.head_dim <= 128 else 64, power_of_two(kind.group))
    per_tile = rows // kind.group
    wide = kind.head_dim > 64
    constants = {
        **kind._common(),
        "TOKENS": per_tile,
        "ROWS": rows,
        "TILE": 128 if wide and kind.head_dim <= 128 else 64,
        "DECODES": decodes,
    }
    options = {"num_warps": 8 if rows >= 128 else 4, "num_stages": 2 if wide else 3}
    return Launch(constants, options, (tokens // per_tile + batch, kind.kv_heads))


def prefill_launches(kind: AttentionKind) -> list[Launch]:
    """Every form of `paged_prefill` that a step with several new tokens a sequence may take, beside a `decode` of the others."""
    launches = [prefill(kind, tokens, 1, decodes=False) for tokens in (1, 1 << 20)]
    return launches if launches[0].constants != launches[1].constants else launches[:1]


def feed(count: int) -> Launch:
    """`feed_tokens` for `count` rows of input."""
    return Launch({"BLOCK": 256}, {"num_warps": 2}, (-(-count // 256),))


def locate(block_size: int, batch: int) -> Launch:
    """`locate_tokens`, once a step."""
    return Launch({"BLOCK_SIZE": block_size, "CHUNK": 128}, {"num_warps": 4}, (batch, 1))


def write(kind: AttentionKind, tokens: int, *, rotary: int, interleaved: bool) -> Launch:
    """`rope_and_write` for `tokens` new tokens; `rotary` channels of a head turn."""
    constants = {
        "KV_HEADS": kind.kv_heads,
        "GROUP": kind.group,
        "GROUP_PAD": power_of_two(kind.group),
        "HEAD_DIM": kind.head_dim,
        "DIM_PAD": power_of_two(kind.head_dim, 16),
        "BLOCK_SIZE": kind.block_size,
        "ROTARY": rotary,
        "INTERLEAVED": interleaved,
        "QUANTIZED": kind.quantized,
    }
    return Launch(constants, {"num_warps": 1}, (tokens, kind.kv_heads))


@dataclass(frozen=True)
class SamplingGrid:
    """How the sampling kernels cut `rows` rows of `vocab` logits. The tokens don't depend on it."""

    rows: int
    vocab: int
    splits: int
    tile: int = 2048
    MAX_SPLITS: ClassVar[int] = 64

    @classmethod
    def fill(cls, rows: int, vocab: int, multiprocessors: int) -> SamplingGrid:
        """Eight programs a multiprocessor, as long as each has a whole tile of logits."""
        wanted = -(-8 * multiprocessors // rows)
        return cls(rows, vocab, max(1, min(wanted, cls.MAX_SPLITS, vocab // cls.tile)))

    @property
    def tiles_pad(self) -> int:
        return power_of_two(-(-self.vocab // self.tile))

    @property
    def scratch_shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name → (dtype, shape) of what the kernels leave for each other; each but the last is of a multiple of 128 bytes."""
        return {
            "hist": ("int64", (self.rows, 6, 1024)),
            "state": ("int64", (self.rows, 16)),
            "parts": ("float32", (self.rows, 2, self.MAX_SPLITS)),
            "first": ("int32", (self.rows, self.MAX_SPLITS)),
            "mass": ("int64", (self.rows, self.tiles_pad)),
        }

    def launches(self) -> dict[str, Launch]:
        """Kernel name → launch, in their order; `sample_narrow` goes six times."""
        common = {"VOCAB": self.vocab, "TILE": self.tile, "MAX_SPLITS": self.MAX_SPLITS}
        tiled, grid = common | {"TILES_PAD": self.tiles_pad}, (self.rows, self.splits)
        return {
            "sample_peaks": Launch(common, {"num_warps": 4}, grid),
            "sample_narrow": Launch(common, {"num_warps": 8}, grid),
            "sample_weigh": Launch(tiled, {"num_warps": 8}, grid),
            "sample_choose": Launch(tiled, {"num_warps": 8}, (self.rows,)),
        }
