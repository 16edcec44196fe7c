"""Rotary position embedding from its primitives, whatever frequencies it uses and however it is written."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.analysis.positions import depends_on_positions
from llmlab.graph.analysis.rotation import MOVES, Region, Rotation, enclose, identify
from llmlab.graph.edit import Editor, producer, scalar, scope
from llmlab.graph.rewrite import Match, Pass

_FARTHEST = 24  # tensors behind the first product with cos or sin


class FuseRoPE(Pass):
    """Primitives that turn pairs of channels by a token's position → RotaryEmbedding with tables (Su et al., 2021).

    The rotation is recognised by calling what lies between a head and its turned self with every channel in turn:
    halves or neighbours as pairs, the whole head or its first channels, any layout and spelling. cos and sin may be
    any function of the position alone, so scaled frequencies (llama3, linear, yarn, longrope) need no case of their own.
    """

    name = "fuse_rope"

    def __init__(self) -> None:
        self._known: dict[Hashable, Rotation | str] = {}
        self._tables: dict[int, tuple[gs.Constant, gs.Constant]] = {}

    def find(self, edit: Editor) -> Iterator[Match]:
        nodes = list(edit.surgeon.nodes)
        order = {id(n): i for i, n in enumerate(nodes)}
        positional = depends_on_positions(edit.surgeon)
        inside: set[int] = set()
        for node in nodes:
            if id(node) in inside or not node.outputs or not _meets_positions(node, positional) or _is_table(node):
                continue
            best: Match | None = None
            for y in _behind(node, order, positional):
                region = enclose(y, order, positional)
                if region is None or (tokens := _token_axis(edit, region)) is None:
                    continue
                key = region.signature()
                if key not in self._known:
                    self._known[key] = identify(region, tokens, edit.graph.config.max_position_embeddings)
                found = self._known[key]
                match = Match(node=y.inputs[0], region=region, tokens=tokens, found=found)
                if isinstance(found, Rotation):
                    best = match
                    break
                best = match if best is None else best
            if best is not None:
                inside |= {id(n) for n in best.region.nodes}
                yield best

    def check(self, edit: Editor, match: Match) -> str | None:
        return None if isinstance(match.found, Rotation) else match.found

    def rewrite(self, edit: Editor, match: Match) -> None:
        region: Region = match.region
        rotation: Rotation = match.found
        positions = next(t for t in edit.surgeon.inputs if t.name == "position_ids")
        if id(rotation) not in self._tables:
            self._tables[id(rotation)] = self._constants(edit, rotation)
        x, where, dtype = region.x, scope(match.node), region.x.dtype or np.dtype(np.float32)
        shape = list(x.shape or ())
        attrs: dict[str, int] = {"interleaved": int(rotation.interleaved)}
        if rotation.width < shape[-1]:
            attrs["rotary_embedding_dim"] = rotation.width
        turn, by_head = {"perm": [0, 2, 1, 3]}, [shape[0], shape[2], shape[1], shape[3]]
        if match.tokens == 1:
            x = edit.add("Transpose", where, [x], turn, dtype=dtype, shape=by_head)
        fused = edit.add(
            "RotaryEmbedding", where, [x, *self._tables[id(rotation)], positions], attrs, dtype=dtype, shape=x.shape
        )
        if match.tokens == 1:
            fused = edit.add("Transpose", where, [fused], turn, dtype=dtype, shape=shape)
        edit.replace(region.y, fused)

    def _constants(self, edit: Editor, rotation: Rotation) -> tuple[gs.Constant, gs.Constant]:
        """The tables as constants; rotations with the same tables share them."""
        for other in self._known.values():
            if isinstance(other, Rotation) and id(other) in self._tables and _same_tables(other, rotation):
                return self._tables[id(other)]
        return edit.constant("rope.cos", rotation.cos), edit.constant("rope.sin", rotation.sin)


def _same_tables(a: Rotation, b: Rotation) -> bool:
    return np.array_equal(a.cos, b.cos) and np.array_equal(a.sin, b.sin)


def _meets_positions(node: gs.Node, positional: dict[int, bool]) -> bool:
    """Whether a head may meet cos or sin here."""
    kinds = [positional.get(id(t)) for t in node.inputs]
    return node.op in ("Mul", "RotaryEmbedding") and False in kinds and True in kinds


def _is_table(node: gs.Node) -> bool:
    """Whether a RotaryEmbedding has its tables and the graph's own positions already."""
    if node.op != "RotaryEmbedding" or len(node.inputs) != 4 or len(node.inputs[0].shape or ()) != 4:
        return False
    return all(isinstance(t, gs.Constant) for t in node.inputs[1:3]) and node.inputs[3].name == "position_ids"


def _behind(node: gs.Node, order: dict[int, int], positional: dict[int, bool]) -> list[gs.Tensor]:
    """Tensors that such nodes alone make of this one's result, the farthest first."""
    found: dict[int, gs.Tensor] = {}
    pending = list(node.outputs)
    while pending and len(found) < _FARTHEST:
        tensor = pending.pop(0)
        if id(tensor) in found:
            continue
        found[id(tensor)] = tensor
        pending += [
            t for reader in tensor.outputs if reader.op in MOVES and id(reader) in order for t in reader.outputs
        ]
    return sorted((t for t in found.values() if not _scaled_for_product(t)), key=lambda t: -order[id(t.inputs[0])])


def _scaled_for_product(y: gs.Tensor) -> bool:
    """Whether `y` is a tensor times one number, read by products alone: attention's scale, which is no part of the tables."""
    scaled = producer(y, "Mul") is not None and any(scalar(t) is not None for t in y.inputs[0].inputs)
    return scaled and bool(y.outputs) and all(n.op == "MatMul" for n in y.outputs)


def _token_axis(edit: Editor, region: Region) -> int | None:
    """The axis of x [batch, heads, sequence, dim] or [batch, sequence, heads, dim] that counts tokens, if y is alike."""
    ids = next((t for t in edit.surgeon.inputs if t.name == "input_ids"), None)
    ids = ids or next((t for t in edit.surgeon.inputs if t.name == "position_ids"), None)
    shape = region.x.shape
    if ids is None or shape is None or len(shape) != 4 or list(region.y.shape or ()) != list(shape):
        return None
    sequence = (ids.shape or [None])[-1]
    axes = [a for a in (1, 2) if shape[a] == sequence]
    fits = len(axes) == 1 and isinstance(shape[3 - axes[0]], int) and isinstance(shape[3], int)
    return axes[0] if fits else None
