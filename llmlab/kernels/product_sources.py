"""What is compiled for a linear layer's product."""

from __future__ import annotations

from llmlab.kernels.gpu import launch_product
from llmlab.kernels.gpu.geometry import Launch
from llmlab.kernels.gpu.launch_product import ProductKind
from llmlab.kernels.source import TRITON_TYPES, KernelSource


def product_sources(kind: ProductKind, max_rows: int) -> list[KernelSource]:
    """The kernels of one product in steps of up to `max_rows` rows: one for each class of rows, shared by other sizes."""
    sources = [product_source(*launch) for launch in launch_product.launches(kind, max_rows)]
    if launch_product.widens(kind, max_rows):
        sources.append(_widen_source(kind))
    return [*sources, _quantize_source(kind)] if kind.x else sources


def product_source(kind: ProductKind, name: str, launch: Launch) -> KernelSource:
    """The kernel of one launch."""
    stored = "*i32" if kind.x and name == "product_rows" else "*i8" if kind.x else "*i16"
    types = {
        **dict.fromkeys(("bias", "add"), TRITON_TYPES[kind.dtype]),
        "x": stored if kind.x else TRITON_TYPES[kind.dtype],
        "weight": stored if kind.bits < 16 else TRITON_TYPES[kind.dtype],
        "out": TRITON_TYPES[kind.out_dtype],
        "scale": "*fp16",
        "x_scale": "*fp32",
        **dict.fromkeys(("rows", "depth", "width", "x_stride"), "i32"),
    }
    has = {"scale": kind.scale_shape is not None, "x_scale": kind.x, "bias": kind.bias, "add": kind.add}
    null = tuple(parameter for parameter, there in has.items() if not there)
    labels = launch_product.labels(kind, launch)
    aligned = ("x", "weight", "scale", "bias", "add", "out", "depth", "x_stride")
    hints = (*aligned, "width") if labels["ALIGNED_WIDTH"] else aligned
    function = f"llmlab.kernels.gpu.product:{name}"
    late = {"EARLY": False} if _starts_late(kind, name, launch) else {}
    return KernelSource(function, types, {**launch.constants, **late}, launch.options, null, hints, labels)


def _starts_late(kind: ProductKind, name: str, launch: Launch) -> bool:
    """Whether a product loses by starting before the kernel in front is over (`benchmarks/gpu_layers.py`): rows whose x is made
    int8 just before, and tiles of few rows beside weights of 16 bits, whose many stages take the shared memory of what still runs."""
    if name == "product_rows":
        return bool(kind.x)
    return kind.bits == 16 and launch.constants["BLOCK_ROWS"] <= 32


def _widen_source(kind: ProductKind) -> KernelSource:
    name, launch = launch_product.widen(kind)
    types = {"wide": TRITON_TYPES[kind.dtype], "weight": "*i16", "scale": "*fp16", "depth": "i32"}
    null = () if kind.group else ("scale",)
    aligned = ("wide", "weight", "scale", "depth")
    function = f"llmlab.kernels.gpu.widen:{name}"
    return KernelSource(function, types, launch.constants, launch.options, null, aligned, launch.constants)


def _quantize_source(kind: ProductKind) -> KernelSource:
    name, launch = launch_product.quantize(kind, 1)
    types = {
        "values": "*i8",
        "scale": "*fp32",
        "x": TRITON_TYPES[kind.dtype],
        "given": "*fp32",
        "depth": "i32",
        "x_stride": "i32",
    }
    null = () if launch.constants["STATIC"] else ("given",)
    labels = {**launch.constants, "DTYPE": kind.dtype}
    aligned = ("values", "x", "depth", "x_stride")
    return KernelSource(
        f"llmlab.kernels.gpu.quantize:{name}", types, launch.constants, launch.options, null, aligned, labels
    )
