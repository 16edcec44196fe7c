"""What runs in a step of a TensorRT engine: layers of its plans, as the builder listed them, and the kernels between the plans."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmlab.evaluate.layers.model import kind_of, operator
from llmlab.evaluate.layers.steps import Steps
from llmlab.kernels.kv_cache import BITS
from llmlab.runtime.engine import Engine
from llmlab.runtime.program import Attend, Multiply, Normalize, Program, RunPlan
from llmlab.tensorrt.layers import Layer, Value

_TYPES = {
    "Half": "float16",
    "Float": "float32",
    "BFloat16": "bfloat16",
    "Int8": "int8",
    "Int4": "int4",
    "FP8": "fp8",
    "Int32": "int32",
    "Int64": "int64",
    "Bool": "bool",
}
_BITS = {"float16": 16, "float32": 32, "bfloat16": 16, "int8": 8, "int4": 4, "fp8": 8, "int32": 32, "int64": 64}
_IDLE = frozenset(("shape_call", "NoOp", "Constant"))
"""Kinds of layers that run nothing on the GPU."""
_GROUP = re.compile(r"_(myl\d+)_\d+$")
_PROFILE = re.compile(r"\[profile (\d+)\]")
_FUSED = re.compile(r"^__myl_(\w+?)(?:_myl\d+)?(?:_\d+)*$")
_FOREIGN = re.compile(r"ForeignNode\[(.+?)\.\.\.(.+?)\]")


@dataclass
class Ran:
    """Something that runs in a step: a layer of a plan, or a kernel of ours."""

    step: int
    """Its place in the program."""
    nodes: tuple[str, ...]
    """Of the lowered graph."""
    what: str
    dtype: str
    weight_bytes: int = 0
    bytes: int = 0
    flops: int = 0


class Reader:
    """Finds what runs in one phase: `ran()`. listings: the layers of each plan; parts: the ONNX nodes of each part that runs a plan."""

    def __init__(
        self,
        engine: Engine,
        program: Program,
        listings: Mapping[str, tuple[Layer, ...]],
        parts: Sequence[Sequence[str]],
        steps: Steps,
        phase: str,
    ) -> None:
        self._kv, self._program, self._listings = engine.manifest.kv, program, listings
        self._parts = parts
        self._phase, self._steps = phase, steps
        self._rows = {"T": steps.tokens(phase), "N": steps.batch if phase == "decode" else 1}

    def ran(self) -> list[Ran]:
        found: list[Ran] = []
        plans = 0
        first: dict[str, Sequence[str]] = {}
        for at, step in enumerate(self._program.steps):
            if isinstance(step, RunPlan):
                mine = self._parts[plans] if plans < len(self._parts) else ()
                plans += 1
                theirs = first.setdefault(
                    step.plan, mine
                )  # the listing has the names of the first part that runs the plan
                found += self._plan(at, step, mine, dict(zip(theirs, mine, strict=False)))
            elif isinstance(step, Multiply):
                found.append(self._multiply(at, step))
            elif isinstance(step, Normalize):
                dtype = self._program.tensors[step.x.tensor].dtype
                rows = self._rows_of(step.out)
                held = self._weight(step.weight)
                moved = 2 * rows * step.width * BITS[dtype] // 8 + held
                found.append(Ran(at, (step.name,), "norm kernel", dtype, held, moved))
            else:
                found.append(self._attend(at, step))
        return found

    def _plan(self, at: int, step: RunPlan, nodes: Sequence[str], names: Mapping[str, str]) -> list[Ran]:
        layers = [x for x in self._of_phase(self._listings.get(step.plan, ())) if x.kind not in _IDLE]
        if not layers:
            return [Ran(at, tuple(nodes), "a plan whose layers were not listed", "")]
        ran = []
        for layer in layers:
            mine = tuple(names[n] for n in nodes_of(layer, list(names)) if n in names)
            weights = sum(self._bytes(v) for v in layer.constants)
            moved = weights + sum(self._bytes(v) for v in (*layer.inputs, *layer.outputs))
            if layer.kind.startswith("Plugin"):
                ran.append(self._plugin(at, layer, mine))
                continue
            matrix = _matrix(layer) if "product" in {kind_of((operator(n),)) for n in mine} else None
            flops = 2 * self._rows["T"] * matrix.shape[0] * matrix.shape[1] if matrix is not None else 0
            ran.append(Ran(at, mine, _what(layer), _precision(layer), weights, moved, flops))
        return ran

    def _plugin(self, at: int, layer: Layer, nodes: tuple[str, ...]) -> Ran:
        """Attention inside a plan: its pool is [2, blocks, kv_heads, tokens, channels], of which it touches the sequences' keys."""
        looked, touched = self._steps.keys(self._phase)
        pool = next((v for v in layer.inputs if len(v.shape) == 5), None)
        rows = [v for v in (*layer.inputs, *layer.outputs) if len(v.shape) == 2]
        width = layer.outputs[0].shape[-1] if layer.outputs else 0
        cache = 0 if pool is None else 2 * pool.shape[2] * pool.shape[4] * BITS[self._kv.dtype] // 8 * touched
        moved = cache + sum(map(self._bytes, rows))
        dtype = _precision(layer)
        return Ran(
            at,
            nodes,
            _what(layer),
            dtype if dtype == self._kv.dtype else f"{dtype}, cache {self._kv.dtype}",
            0,
            moved,
            4 * width * looked,
        )

    def _of_phase(self, layers: Sequence[Layer]) -> list[Layer]:
        """Decode steps run the first optimization profile, prompts the last."""
        profiles = profiles_of(layers)
        wanted = 0 if self._phase == "decode" else max(profiles, default=0)
        return [layer for layer, profile in zip(layers, profiles, strict=True) if profile == wanted]

    def _multiply(self, at: int, step: Multiply) -> Ran:
        x = self._program.tensors[step.x.tensor].dtype
        rows = self._rows_of(step.out)
        wide = step.width * (2 if step.gate else 1)
        weights = sum(self._weight(name) for name in (step.weight, step.scale, step.bias) if name)
        moved = weights + rows * (step.depth + step.width * (2 if step.add else 1)) * BITS[x] // 8
        more = [f"{step.gate} gate" if step.gate else "", "bias" if step.bias else "", "residual" if step.add else ""]
        what = " + ".join(["product kernel", *filter(None, more)])
        acts = step.rounded or x
        dtype = step.weight_dtype if step.weight_dtype == acts and not step.rounded else f"{step.weight_dtype} × {acts}"
        return Ran(at, (step.name,), what, dtype, weights, moved, 2 * rows * wide * step.depth)

    def _attend(self, at: int, step: Attend) -> Ran:
        x = self._program.tensors[step.out].dtype
        looked, touched = self._steps.keys(self._phase)
        cache = 2 * step.kv_heads * step.head_dim * BITS[self._kv.dtype] // 8 * touched
        width = 2 * step.num_heads + 2 * step.kv_heads
        moved = cache + self._rows["T"] * width * step.head_dim * BITS[x] // 8
        dtype = x if self._kv.dtype == x else f"{x}, cache {self._kv.dtype}"
        return Ran(at, (step.name,), "attention kernel", dtype, 0, moved, 4 * step.num_heads * step.head_dim * looked)

    def _rows_of(self, tensor: str) -> int:
        return self._rows[self._program.tensors[tensor].rows]

    def _weight(self, name: str) -> int:
        spec = self._program.weights[name]
        count = 1
        for size in spec.shape:
            count *= size
        return count * BITS.get(spec.dtype, 8) // 8

    def _bytes(self, value: Value) -> int:
        count = 1
        for size in value.shape:
            count *= size if size >= 0 else self._rows["T"]
        return count * _BITS.get(_TYPES.get(value.dtype, ""), 8) // 8


def profiles_of(layers: Sequence[Layer]) -> list[int]:
    """The optimization profile of each layer. TensorRT lists one after another, and names it only where a layer touches what the
    plan's parts hand each other; what was fused in one go (`…_myl29_3`) is of one profile."""
    said: list[int | None] = []
    by_group: dict[str, int] = {}
    groups = [found[1] if (found := _GROUP.search(layer.name)) else "" for layer in layers]
    for layer, group in zip(layers, groups, strict=True):
        text = " ".join((layer.name, *(v.name for v in (*layer.inputs, *layer.outputs))))
        found = _PROFILE.search(text)
        said.append(int(found[1]) if found else None)
        if found and group:
            by_group[group] = int(found[1])
    profiles: list[int] = []
    for number, group in zip(said, groups, strict=True):
        known = number if number is not None else by_group.get(group, 0 if group else None)
        profiles.append(known if known is not None else profiles[-1] if profiles else 0)
    return profiles


def _matrix(layer: Layer) -> Value | None:
    """The largest constant that is a matrix: the weight of a product, or a table."""
    matrices = [v for v in layer.constants if len(v.shape) == 2 and min(v.shape) > 1]
    return max(matrices, key=lambda v: v.shape[0] * v.shape[1], default=None)


def nodes_of(layer: Layer, known: Sequence[str]) -> list[str]:
    """The ONNX nodes that a layer computes: as it says itself, or, from a TensorRT that doesn't, as its name tells."""
    if layer.nodes:
        return list(layer.nodes)
    place = {name: i for i, name in enumerate(known)}
    if (range_of := _FOREIGN.search(layer.name)) is not None:
        ends = [place[name] for name in range_of.groups() if name in place]
        return list(known[min(ends) : max(ends) + 1]) if ends else []
    return [part.strip() for part in re.split(r" \+ |\|\|", layer.name) if part.strip() in place]


def _what(layer: Layer) -> str:
    """What it is, without what names the place: the same for layers that are alike."""
    fused = _FUSED.match(layer.name)
    if layer.kind.startswith("Plugin"):
        return "attention plugin"
    return f"{layer.kind} {fused[1]}" if fused else layer.kind or layer.name


def _precision(layer: Layer) -> str:
    made = _TYPES.get(layer.outputs[0].dtype, layer.outputs[0].dtype) if layer.outputs else ""
    weight = _matrix(layer)
    if weight is None:
        return made
    held = _TYPES.get(weight.dtype, weight.dtype)
    x = _TYPES.get(layer.inputs[0].dtype, layer.inputs[0].dtype) if layer.inputs else made
    return f"{held} × {x}" if held in ("int8", "int4", "fp8") else held
