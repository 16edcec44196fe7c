"""One product started by Triton's own launcher on torch tensors: for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from llmlab.errors import require
from llmlab.kernels.gpu import launch_product
from llmlab.kernels.gpu.launch_product import PACKED_TYPES, ProductKind, Tile, Vector
from llmlab.kernels.gpu.product import product_rows, product_tiles

_KERNELS = {"product_rows": product_rows, "product_tiles": product_tiles}


def start_product(
    kind: ProductKind,
    out: Any,
    x: Any,
    weight: Any,
    scale: Any = None,
    bias: Any = None,
    add: Any = None,
    cut: Vector | Tile | None = None,
) -> None:
    """Fill `out` [rows, width]; see `ProductKind` for the others. int4 weights are int8 [outputs, depth / 2]."""
    torch = require("torch", "export")
    rows = len(out)
    name, launch = launch_product.launch(kind, rows, cut)
    words = {"*i8": torch.int8, "*i16": torch.int16, "*i32": torch.int32, "*i64": torch.int64}
    views = {name: words[word] for name, word in PACKED_TYPES.get((name, kind.bits), {}).items()}
    given = {"x": x, "weight": weight}
    given |= {name: given[name].view(dtype) for name, dtype in views.items()}
    _KERNELS[name][launch.grid](
        *(out, given["x"], given["weight"], scale, bias, add, rows, kind.depth, kind.width, x.stride(0)),
        **launch.constants,
        **launch.options,
    )
