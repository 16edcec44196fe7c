"""ONNX graphs on disk: weights in a file of their own, streamed one tensor at a time, opened as memory maps."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx import TensorProto
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from llmlab.errors import GraphError
from llmlab.files import PROTO_LIMIT, read_bytes
from llmlab.graph.store.check import check_model
from llmlab.graph.store.deferred import DeferredValues, Packed
from llmlab.graph.store.external import map_external
from llmlab.graph.store.lazy import Values
from llmlab.graph.store.packed import is_packed, pack
from llmlab.graph.store.references import References
from llmlab.progress import byte_bar

MODEL, WEIGHTS = "graph.onnx", "weights.bin"
_INLINE = 1024  # bytes; smaller constants stay in the protobuf
_ALIGN = 4096  # bytes; so that a runtime can map each tensor


class External(LazyValues):
    """A constant that lies in an external data file, as the protobuf refers to it."""

    def __init__(self, location: str, offset: int, length: int, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype, self.nbytes = shape, dtype, length
        self.tensor = TensorProto(data_type=onnx_dtype(dtype), dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            self.tensor.external_data.add(key=key, value=str(value))


def constants(graph: gs.Graph) -> list[gs.Constant]:
    """Every constant that a node reads, a shared one once."""
    return list({id(t): t for n in graph.nodes for t in n.inputs if isinstance(t, gs.Constant)}.values())


def onnx_dtype(dtype: np.dtype) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def array(constant: gs.Constant) -> np.ndarray:
    """A constant's values; a deferred one is computed and not kept."""
    return loaded(constant._values)


def loaded(values: np.ndarray | LazyValues) -> np.ndarray:
    """What a constant holds, as an array. What outlives a constant keeps its values: writing swaps them for a while."""
    return values.load() if isinstance(values, LazyValues) else values


def write_onnx(
    graph: gs.Graph,
    folder: Path,
    model: str = MODEL,
    weights: str = WEIGHTS,
    references: References | None = None,
    written: dict[int, External] | None = None,
) -> None:
    """Write `graph` as `folder/model`, every constant over a kilobyte in `folder/weights`.

    references: leave what is mapped from a file where it is, and collect these files here.
    written: where constants lie that an earlier graph in `folder` had as well, by the id of their values; those of this one are added.
    Peak memory is the largest tensor: constants are memory maps or deferred, and each is dropped once written.
    """
    large = [c for c in constants(graph) if c._values.nbytes >= _INLINE]
    with (
        (folder / weights).open("wb") as file,
        _swapped(constants(graph)) as swap,
        byte_bar(sum(c._values.nbytes for c in large), "weights") as advance,
    ):
        for constant in constants(graph):
            before = constant._values
            if constant._values.nbytes < _INLINE:
                continue  # one that is deferred is computed where it goes into the protobuf
            advance(int(before.nbytes))
            if references is not None and (known := references.place(before)) is not None:
                swap(constant, External(*known, before.nbytes, before.dtype, tuple(before.shape)))
                continue
            if written is not None and id(before) in written:
                swap(constant, written[id(before)])
                continue
            file.write(b"\0" * (-file.tell() % _ALIGN))
            stored = _stored(before)
            place = External(weights, file.tell(), stored.nbytes, np.dtype(before.dtype), tuple(before.shape))
            swap(constant, place)
            if written is not None:
                written[id(before)] = place
            file.write(stored.data)
            del stored
            release(before)
        proto = gs.export_onnx(graph, do_type_check=False, ir_version=11)
    (folder / model).write_bytes(proto.SerializeToString())


def _stored(values: np.ndarray | LazyValues) -> np.ndarray:
    """What a constant holds, as the bytes [n] that go into a file."""
    if isinstance(values, Packed):
        return np.asarray(values.packed)
    flat = np.ascontiguousarray(loaded(values)).reshape(-1)
    return pack(flat) if is_packed(flat.dtype) else flat.view(np.uint8)


def release(values: object) -> None:
    """Give the pages of read-only maps back to the system: they would count as this process's memory, and once written
    are not needed again."""
    if isinstance(values, DeferredValues):
        for source in values.sources:
            release(source)
    while isinstance(values, np.ndarray):
        if isinstance(values, np.memmap) and values.mode == "r" and isinstance(values.base, mmap.mmap):
            values.base.madvise(mmap.MADV_DONTNEED)
        values = values.base


@contextmanager
def _swapped(tensors: list[gs.Constant]) -> Iterator:
    """Let constants stand for something else while the protobuf is made, then give them their values back."""
    kept = [(t, t._values) for t in tensors]

    def swap(tensor: gs.Constant, values: LazyValues | np.ndarray) -> None:
        tensor._values = values

    try:
        yield swap
    finally:
        for tensor, values in kept:
            tensor._values = values


def from_proto(proto: onnx.ModelProto) -> gs.Graph:
    """The surgeon's graph of an ONNX model, with NumPy types throughout: the surgeon leaves a bfloat16 as its code."""
    with G_LOGGER.suppress(G_LOGGER.ERROR):  # it warns of what is mended here
        graph = gs.import_onnx(proto)
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and isinstance(tensor.dtype, int) and tensor.dtype:
            tensor.dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.dtype))
        elif isinstance(tensor, gs.Variable) and isinstance(tensor.dtype, Message):
            tensor.dtype = None  # a value whose declared type is empty
    return graph


def parse_onnx(path: Path) -> onnx.ModelProto:
    """The protobuf at `path`. Raises GraphError where it is none, or larger than such a file may be."""
    data = read_bytes(path, GraphError, PROTO_LIMIT)
    try:
        return onnx.load_model_from_string(data)
    except DecodeError as problem:
        raise GraphError(f"{path}: not an ONNX model: truncated or altered") from problem


def read_onnx(
    folder: Path,
    model: str = MODEL,
    weights: str = WEIGHTS,
    references: Mapping[str, BinaryIO] = MappingProxyType({}),
) -> gs.Graph:
    """Open what `write_onnx` wrote. Refuses weights outside `folder/weights` and the files in `references`, or past their
    end (GraphError)."""
    path = folder / model
    proto = parse_onnx(path)
    check_model(proto, path, domains=None)
    arrays = map_external(path, proto.graph.initializer, weights, references)
    try:
        graph = from_proto(proto)
        fill_constants(graph, arrays)
    except Exception as problem:  # the surgeon and onnx raise whatever a malformed field makes of them
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise GraphError(f"{path}: malformed ({reason}): altered, export it again") from problem
    return graph


def fill_constants(graph: gs.Graph, arrays: Mapping[str, Values]) -> None:
    """Give constants the array of their name, and those that have none what the model itself holds for them."""
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            tensor.data_location = None
            if tensor.name in arrays:
                tensor._values = arrays[tensor.name]
            elif isinstance(tensor._values, LazyValues):
                values = onnx.numpy_helper.to_array(tensor._values.tensor)
                tensor._values = Packed.of(values) if is_packed(values.dtype) else values
