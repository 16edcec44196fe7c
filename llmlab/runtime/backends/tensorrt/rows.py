"""Products and norms between the parts: what each one's kernel reads and writes, row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmlab.cuda import Device, DeviceBuffer, Stream
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.gpu.launch_norm import NormKind
from llmlab.kernels.gpu.launch_product import ProductKind
from llmlab.kernels.norms import NormPointers, RowNorm
from llmlab.kernels.products import Product, ProductPointers
from llmlab.runtime.backends.tensorrt.buckets import StepShape
from llmlab.runtime.backends.tensorrt.memory import ITEM_BYTES
from llmlab.runtime.program import Multiply, Normalize, Program

Enqueue = Callable[[Stream, int], None]
"""Launches a step's kernel on so many rows."""


def product_kind(step: Multiply, program: Program) -> ProductKind:
    """What a product's kernels are compiled for. Raises InputError where there are none."""
    return ProductKind(
        depth=step.depth,
        width=step.width,
        dtype=program.tensors[step.x.tensor].dtype,
        out_dtype=program.tensors[step.out].dtype,
        weight=step.weight_dtype,
        group=step.group,
        gate=step.gate,
        bias=step.bias is not None,
        add=step.add is not None,
        x=step.rounded,
    )


def norm_kind(step: Normalize, program: Program) -> NormKind:
    """What a norm's kernel is compiled for. Raises InputError where there is none."""
    return NormKind(
        width=step.width,
        dtype=program.tensors[step.x.tensor].dtype,
        out_dtype=program.tensors[step.out].dtype,
        weight_dtype=program.weights[step.weight].dtype,
        epsilon=step.epsilon,
    )


class RowLayers:
    """The products and norms of one program, by their place in it."""

    def __init__(self, program: Program, kernels: KernelSet, device: Device, limits: tuple[int, int]) -> None:
        """limits: most tokens and most sequences of a step. Raises EngineError where there are no kernels for this GPU."""
        self._program = program
        self._products: dict[ProductKind, Product] = {}
        self._norms: dict[NormKind, RowNorm] = {}
        scratch = 0
        for step in program.steps:
            if isinstance(step, Multiply):
                kind = product_kind(step, program)
                if kind not in self._products:
                    self._products[kind] = Product(kernels, device, kind)
                of_tokens = program.tensors[step.x.tensor].rows == "T"
                scratch = max(scratch, self._products[kind].scratch_bytes(limits[0 if of_tokens else 1]))
            if isinstance(step, Normalize) and (norm := norm_kind(step, program)) not in self._norms:
                self._norms[norm] = RowNorm(kernels, device, norm)
        self._scratch = DeviceBuffer(scratch, "products")
        self._steps: dict[int, tuple[Enqueue, bool]] = {}

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Where tensors and weights lie."""
        for at, step in enumerate(self._program.steps):
            if isinstance(step, Multiply | Normalize):
                bound = self._product(step, addresses) if isinstance(step, Multiply) else self._norm(step, addresses)
                self._steps[at] = bound, self._program.tensors[step.x.tensor].rows == "T"

    def enqueue(self, at: int, shape: StepShape, stream: Stream) -> None:
        """The program's step number `at`."""
        run, of_tokens = self._steps[at]
        run(stream, shape.tokens if of_tokens else shape.rows)

    def free(self) -> None:
        self._scratch.free()

    def _product(self, step: Multiply, at: Mapping[str, int]) -> Enqueue:
        x, x_stride = self._rows(step, at)
        scale, bias, add = (0 if name is None else at[name] for name in (step.scale, step.bias, step.add))
        pointers = ProductPointers(
            x, x_stride, at[step.weight], at[step.out], scale, bias, add, scratch=self._scratch.pointer
        )
        product = self._products[product_kind(step, self._program)]
        return lambda stream, rows: product.enqueue(stream, pointers, rows=rows)

    def _norm(self, step: Normalize, at: Mapping[str, int]) -> Enqueue:
        x, x_stride = self._rows(step, at)
        pointers = NormPointers(x, x_stride, at[step.weight], at[step.out])
        norm = self._norms[norm_kind(step, self._program)]
        return lambda stream, rows: norm.enqueue(stream, pointers, rows=rows)

    def _rows(self, step: Multiply | Normalize, at: Mapping[str, int]) -> tuple[int, int]:
        """Address and stride of x."""
        spec = self._program.tensors[step.x.tensor]
        return at[step.x.tensor] + step.x.offset * ITEM_BYTES[spec.dtype], spec.width
