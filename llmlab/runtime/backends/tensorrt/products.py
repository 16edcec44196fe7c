"""The linear layers between the parts: what each one's kernel reads and writes."""

from __future__ import annotations

from collections.abc import Mapping

from llmlab.cuda import Device, Stream
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.gpu.launch_product import ProductKind
from llmlab.kernels.products import Product, ProductPointers
from llmlab.runtime.backends.tensorrt.buckets import StepShape
from llmlab.runtime.backends.tensorrt.memory import ITEM_BYTES
from llmlab.runtime.program import Multiply, Program


def kind_of(step: Multiply, program: Program) -> ProductKind:
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
    )


class ProductLayers:
    """The products of one program, by their place in it."""

    def __init__(self, program: Program, kernels: KernelSet, device: Device) -> None:
        """Raises EngineError where there are no kernels for this GPU."""
        self._program = program
        made: dict[ProductKind, Product] = {}
        self._products: dict[int, Product] = {}
        for at, step in enumerate(program.steps):
            if isinstance(step, Multiply):
                kind = kind_of(step, program)
                if kind not in made:
                    made[kind] = Product(kernels, device, kind)
                self._products[at] = made[kind]
        self._pointers: dict[int, tuple[ProductPointers, bool]] = {}

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Where tensors and weights lie."""
        for at in self._products:
            step = self._program.steps[at]
            assert isinstance(step, Multiply)
            x = self._program.tensors[step.x.tensor]

            def place(name: str | None) -> int:
                return 0 if name is None else addresses[name]

            pointers = ProductPointers(
                x=addresses[step.x.tensor] + step.x.offset * ITEM_BYTES[x.dtype],
                x_stride=x.width,
                weight=addresses[step.weight],
                out=addresses[step.out],
                scale=place(step.scale),
                bias=place(step.bias),
                add=place(step.add),
            )
            self._pointers[at] = pointers, x.rows == "T"

    def enqueue(self, at: int, shape: StepShape, stream: Stream) -> None:
        """The product of the program's step number `at`."""
        pointers, of_tokens = self._pointers[at]
        self._products[at].enqueue(stream, pointers, rows=shape.tokens if of_tokens else shape.rows)
