"""One product started by Triton's own launcher on torch tensors: for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from llmlab.errors import require
from llmlab.kernels.gpu import launch_product
from llmlab.kernels.gpu.launch_product import ProductKind, Tile, Vector
from llmlab.kernels.gpu.product import product_rows, product_tiles
from llmlab.kernels.gpu.quantize import quantize_rows
from llmlab.kernels.gpu.widen import widen_weight

_KERNELS = {"product_rows": product_rows, "product_tiles": product_tiles}


def start_product(
    kind: ProductKind,
    out: Any,
    x: Any,
    weight: Any,
    scale: Any = None,
    bias: Any = None,
    add: Any = None,
    x_scale: Any = None,
    cut: Vector | Tile | None = None,
) -> None:
    """Fill `out` [rows, width]; see `ProductKind` for the others. Integers of weights are packed, as int8."""
    torch = require("torch", "export")
    rows = len(out)
    name, launch = launch_product.launch(kind, rows, cut)
    if cut is None and launch_product.widens(kind, rows):
        weight = start_widen(kind, weight, scale)
        kind = kind.wide
    if kind.x:
        x, x_scale = start_quantize(kind, x, x_scale)
        if name == "product_rows":
            x, weight = x.view(torch.int32), weight.view(torch.int32)
    elif kind.bits < 16:
        weight = weight.view(torch.int16)
    stride = kind.depth if kind.x else x.stride(0)
    _KERNELS[name][launch.grid](
        *(out, x, x_scale, weight, scale, bias, add, rows, kind.depth, kind.width, stride),
        **launch.constants,
        **launch.options,
    )


def start_widen(kind: ProductKind, weight: Any, scale: Any) -> Any:
    """A packed weight as [outputs, depth] of 16 bits."""
    torch = require("torch", "export")
    dtype = getattr(torch, kind.dtype)
    wide = torch.full((kind.outputs, kind.depth), torch.nan, dtype=dtype, device=weight.device)
    _, launch = launch_product.widen(kind)
    widen_weight[launch.grid](wide, weight.view(torch.int16), scale, kind.depth, **launch.constants, **launch.options)
    return wide


def start_quantize(kind: ProductKind, x: Any, given: Any = None) -> tuple[Any, Any]:
    """x [rows, depth] as int8, and the float32 scale of each row."""
    torch = require("torch", "export")
    values = torch.full(x.shape, -99, dtype=torch.int8, device=x.device)
    scale = torch.full((len(x),), torch.nan, device=x.device)
    _, launch = launch_product.quantize(kind, len(x))
    quantize_rows[launch.grid](values, scale, x, given, kind.depth, x.stride(0), **launch.constants, **launch.options)
    return values, scale
