"""How a product x · Wᵀ is cut into programs: which kernel, which tiles, for how many rows. Plain integers, no GPU library."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llmlab.errors import InputError
from llmlab.kernels.gpu.geometry import Launch, power_of_two
from llmlab.kernels.gpu.product_cuts import CUTS, ROW_CLASSES, Tile, Vector

BITS = {"float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
"""Of one value of a weight, by its type."""
GATES = ("", "silu", "gelu", "gelu_tanh", "relu")
_FLOATS = ("float16", "bfloat16")
_OUTPUTS = (*_FLOATS, "float32")
_FEW_COLUMNS = 8192
_WIDENED = 2048  # columns that a program makes wide
_TILES_TOGETHER = 8  # row tiles whose programs run side by side, so that they find each other's weights in the L2 cache
WIDE_ABOVE = 128
"""Rows of a step beyond which a weight of integers is made wide first, once for all of them: reading it twice and writing it once then costs less
than unpacking it for every tile of rows. At 7B's sizes that takes 0.14 ms a layer; at 2,048 rows the products took 1.24 ms beside wide weights,
1.8 beside int8 and 3.3 beside int4."""
GROUPS = {"int8": (32, 64, 128), "int4": (64, 128)}
"""Columns that may share a scale, by a weight's type: a tensor core takes 16 at once of each of the columns that lie together."""


@dataclass(frozen=True)
class ProductKind:
    """What is fixed about one product when its kernels are compiled.

    out [rows, width] = x [rows, depth] · Wᵀ, with W [outputs, depth]. With a gate W has 2 · width rows, the gate's first, and
    out = act(x·Wgᵀ) · (x·Wuᵀ). Sums are float32, or exact where x is int8 too. Raises InputError for what there are no kernels for.
    """

    depth: int
    """Columns of x and W: a multiple of 16, of 32 for int4."""
    width: int
    dtype: str
    """Of x, bias and add: float16 or bfloat16."""
    out_dtype: str
    weight: str
    """float16, bfloat16 (the same as dtype), int8 or int4. Integers are stored as `packing.pack_weight` has them."""
    group: int = 0
    """int8, int4: columns that share a scale, 32, 64 or 128. 0: a scale for each row of W. A divisor of depth."""
    gate: str = ""
    bias: bool = False
    """bias [outputs] is added, before the gate."""
    add: bool = False
    """add [rows, width] is added to the result: the residual."""
    x: str = ""
    """What x becomes before it is multiplied by int8 weights of one scale a row: "int8", each of its rows by its largest value,
    "int8_static", all of it by one scale that is given, or nothing."""
    scaled: bool = False
    """Beside a weight of 16 bits that holds integers: each column of the sums has a float16 scale, which comes before the bias."""

    def __post_init__(self) -> None:
        quantized = self.weight in ("int8", "int4")
        granule = 32 if self.weight == "int4" else 16
        right = (
            self.dtype in _FLOATS
            and self.out_dtype in _OUTPUTS
            and self.weight in (self.dtype, "int8", "int4")
            and self.gate in GATES
            and self.depth > 0
            and self.width > 0
            and self.depth % granule == 0
            and (self.group in (0, *GROUPS[self.weight]) if quantized else self.group == 0)
            and (not self.group or self.depth % self.group == 0)
            and not (self.scaled and quantized)
            and (not self.x or (self.x in ("int8", "int8_static") and self.weight == "int8" and not self.group))
        )
        if not right:
            raise InputError(
                f"no kernels for the product {self}: expected float16 or bfloat16 x, a weight of its type or of int8 or int4, in groups of "
                f"64 or 128 (int8: 32) that divide depth or none, depth a multiple of {granule}, a gate of {', '.join(filter(None, GATES))} or none, x int8 or int8_static "
                "beside int8 without groups alone"
            )

    @property
    def bits(self) -> int:
        return BITS[self.weight]

    @property
    def outputs(self) -> int:
        """Rows of W."""
        return 2 * self.width if self.gate else self.width

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Of W as it is stored: int4 in bytes of two values."""
        return self.outputs, self.depth // 2 if self.weight == "int4" else self.depth

    @property
    def scale_shape(self) -> tuple[int, ...] | None:
        """Of the float16 scales."""
        if self.bits == 16 and not self.scaled:
            return None
        return (self.outputs, self.depth // self.group) if self.group else (self.outputs,)

    @property
    def wide(self) -> ProductKind:
        """The same beside a weight of the type of x; integers of one scale a row stay integers."""
        return replace(self, weight=self.dtype, group=0, scaled=not self.group)

    @property
    def _constants(self) -> dict[str, Any]:
        return {
            "BITS": self.bits,
            "INTEGERS": bool(self.x),
            "GROUP": self.group,
            "SCALED": self.scale_shape == (self.outputs,),
            "GATE": self.gate,
            "BIAS": self.bias,
            "ADD": self.add,
            "DTYPE": self.dtype,
        }


def row_class(rows: int) -> int:
    """The most rows of the class that `rows` falls into."""
    return next((most for most in ROW_CLASSES if rows <= most), ROW_CLASSES[-1])


def widens(kind: ProductKind, rows: int) -> bool:
    """Whether the weight is made wide before `rows` rows are multiplied."""
    return kind.bits < 16 and not kind.x and rows > WIDE_ABOVE


def multiplied(kind: ProductKind, rows: int) -> ProductKind:
    """The product that `rows` rows go through: beside the wide weight where it is made."""
    return kind.wide if widens(kind, rows) else kind


def tile(kind: ProductKind, rows: int) -> Vector | Tile:
    """How this product is cut for a step of `rows` rows."""
    kind = multiplied(kind, rows)
    cuts = CUTS["8 by 8 bits" if kind.x else f"{kind.bits} bits"]
    few, many, gated = cuts[next(most for most in cuts if rows <= most)]
    cut = gated if kind.gate else few if kind.width <= _FEW_COLUMNS else many
    if isinstance(cut, Tile):
        return replace(cut, depth=min(cut.depth, kind.group or cut.depth))
    if kind.bits == 16 and cut.rows == 1 and kind.depth % 4096 and not kind.gate:
        return replace(cut, warps=2)  # the last turn of the loop would leave most threads of more warps idle
    return cut


def launch(kind: ProductKind, rows: int, cut: Vector | Tile | None = None) -> tuple[str, Launch]:
    """The kernel's name, and its launch for `rows` rows of what is `multiplied`; `cut`: of the kind itself, instead of what `tile` says."""
    if cut is None:
        kind, cut = multiplied(kind, rows), tile(kind, rows)
    columns = -(-kind.width // cut.columns)
    if isinstance(cut, Vector):
        constants = {
            **kind._constants,
            "ROWS": cut.rows,
            "COLUMNS": cut.columns,
            "THREADS": 32 * cut.warps * cut.unroll,
        }
        return "product_rows", Launch(constants, {"num_warps": cut.warps}, (columns, -(-rows // cut.rows)))
    constants = {
        **kind._constants,
        "BLOCK_ROWS": cut.rows,
        "BLOCK_COLUMNS": cut.columns,
        "BLOCK_DEPTH": cut.depth,
        "SWAP": cut.swap,
        "TOGETHER": _TILES_TOGETHER,
    }
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    return "product_tiles", Launch(constants, options, (columns * -(-rows // cut.rows),))


def quantize(kind: ProductKind, rows: int) -> tuple[str, Launch]:
    """What makes x int8 for `rows` rows."""
    block = power_of_two(kind.depth)
    constants = {"BLOCK": block, "STATIC": kind.x == "int8_static"}
    return "quantize_rows", Launch(constants, {"num_warps": max(4, min(16, block // 512))}, (rows,))


def widen(kind: ProductKind) -> tuple[str, Launch]:
    """What makes the weight wide."""
    constants = {"BLOCK": _WIDENED, "BITS": kind.bits, "GROUP": kind.group, "DTYPE": kind.dtype}
    return "widen_weight", Launch(constants, {"num_warps": 4}, (kind.outputs, -(-kind.depth // _WIDENED)))


def launches(kind: ProductKind, max_rows: int) -> list[tuple[ProductKind, str, Launch]]:
    """What steps of up to `max_rows` rows multiply and launch: one for each class of them, some of which share a kernel."""
    classes = ROW_CLASSES[: ROW_CLASSES.index(row_class(max_rows)) + 1]
    found = [(multiplied(kind, rows), *launch(kind, rows)) for rows in classes]
    return list({f"{name} {labels(each, start)}": (each, name, start) for each, name, start in found}.values())


def labels(kind: ProductKind, launch: Launch) -> dict[str, Any]:
    """What tells a compiled kernel from others of its name. Products of other sizes share it."""
    aligned = kind.width % 16 == 0
    warps = {name.upper(): value for name, value in launch.options.items()}
    return {**launch.constants, **warps, "OUT_DTYPE": kind.out_dtype, "ALIGNED_WIDTH": aligned}
