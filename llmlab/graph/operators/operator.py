"""Operators of your own: one declaration gives a shape rule, a NumPy reference, an ONNX body and, if wanted, a kernel."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.errors import InputError
from llmlab.graph.edit import Dim, Editor
from llmlab.graph.operators.check_operator import check
from llmlab.graph.operators.declaration import Declaration, declare
from llmlab.graph.operators.functions import add_function
from llmlab.graph.operators.torch_operator import register


class Launch(NamedTuple):
    """How to launch a Triton kernel on contiguous tensors: `kernel[grid](*inputs, *outputs, *scalars, **constants)`."""

    kernel: Any
    """A `triton.jit` function."""
    grid: tuple[int, ...]
    scalars: tuple[float, ...] = ()
    """Sizes and attributes. They and the grid may change from step to step; what is in `constants` is compiled in."""
    constants: Mapping[str, Any] = MappingProxyType({})


def operator(name: str, *, replace: bool = False) -> Callable[[type], Operator]:
    """Class decorator that declares the operator `name` ("domain::name"); the class becomes an `Operator`.

        @ll.operator("mylab::clipped_silu")
        class clipped_silu:
            limit: float = 7.0                                  # attributes, with their defaults

            def shape(self, x):                                 # shapes in, shape out
                return x

            def reference(self, x):                             # NumPy
                return np.minimum(x / (1 + np.exp(-x)), np.float32(self.limit))

            def onnx(self, op, x):                              # what every target runs
                return op.Min(op.Mul(x, op.Sigmoid(x)), self.limit)

    Attributes are annotated float, int, str, tuple[int, ...] or tuple[float, ...]; one without a default has to be given
    in each call. An operator of several outputs returns tuples. An optional `triton(self, *shapes)` returns the `Launch` of a
    kernel for inputs of these shapes; it is called only where a target runs it, and imports triton itself.
    replace: take the place of an operator of the same name (a cell that is run again).
    Raises InputError for a name that can't be or is taken, and for a declaration that is incomplete.
    """

    def decorate(declaration: type) -> Operator:
        if not isinstance(declaration, type):
            raise InputError(f"{name}: operator decorates a class, got {type(declaration).__name__}")
        made = Operator(name, declaration)
        declare(made, replace=replace)
        return made

    return decorate


class Operator(Declaration):
    """A declared operator. Call it on NumPy arrays (the reference) or on torch tensors (code that is then exported)."""

    def __call__(self, *inputs: Any, **attributes: Any) -> Any:
        """The reference on NumPy arrays; on torch tensors the torch operator, which an export keeps as one node."""
        torch = sys.modules.get("torch")
        if torch is None or not any(isinstance(i, torch.Tensor) for i in inputs):
            return self.reference(*inputs, **attributes)
        given = self.attribute_values(attributes)
        self.check_count(inputs)
        return self.torch_op(*inputs, **given)

    @cached_property
    def torch_op(self) -> Any:
        """The operator registered with torch, from the first use on."""
        return register(self)

    def launch(self, *shapes: tuple[int, ...], **attributes: Any) -> Launch:
        """The Triton kernel for inputs of these shapes. Raises InputError where none is declared."""
        if not self.has_kernel:
            raise InputError(f"{self.name} declares no Triton kernel")
        made = self.with_attributes(**attributes).triton(*shapes)
        if not isinstance(made, Launch):
            raise InputError(f"{self.name}: its triton() returns {type(made).__name__}, expected a Launch")
        return made

    def add(self, edit: Editor, where: str, inputs: Sequence[gs.Tensor], **attributes: Any) -> list[gs.Variable]:
        """Add a node of this operator in module `where`, and its body to the graph; returns the outputs. For passes."""
        given = self.attribute_values(attributes)
        sizes: list[tuple[Any, Sequence[Dim] | None]] = [
            (d, None) for d in self.dtypes(*(np.dtype(t.dtype) for t in inputs), **given)
        ]
        if all(t.shape is not None for t in inputs):
            shapes = self.shapes(*(t.shape for t in inputs), **given)
            sizes = [(dtype, shape) for (dtype, _), shape in zip(sizes, shapes, strict=True)]
        add_function(edit.surgeon, self.function)
        attrs = {n: list(v) if isinstance(v, tuple) else v for n, v in given.items()}
        return edit.add_many(self.op, where, inputs, attrs, sizes, domain=self.domain)

    def check(self, *examples: Any, **attributes: Any) -> float:
        """Run the body in ONNX Runtime on each example (an array, or a tuple of them) and hold it against the reference
        and the shape rule. Returns the largest difference, relative to the largest value of its output.

        Raises InputError that names the example where they differ: by more than 1e-4, in float16 by more than 1e-2.
        """
        return check(self, examples, self.attribute_values(attributes))
