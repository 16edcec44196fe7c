"""Layers of a TensorRT engine: what its builder listed of each plan, and the kernels that run between the plans."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmlab.errors import EngineError, LlmlabError
from llmlab.evaluate.layers.groups import Group, join_groups
from llmlab.evaluate.layers.model import PHASES, CompiledLayer, EngineLayers, kind_of, name_layers, operator
from llmlab.evaluate.layers.steps import Steps
from llmlab.files import read_json
from llmlab.graph.lower.origins import Origin, Origins
from llmlab.kernels.kv_cache import BITS
from llmlab.runtime.engine import Engine
from llmlab.runtime.manifest import LAYERS, PROGRAM
from llmlab.runtime.program import Attend, Multiply, Normalize, Program, RunPlan
from llmlab.tensorrt.inspect import layers_of
from llmlab.tensorrt.layers import Layer, Value, parse_listing

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
class _Ran:
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


def read_layers(engine: Engine, found: Mapping[str, Any], steps: Steps) -> EngineLayers:
    """found: what the build wrote of origins. Times are those of a GPU that can run the engine; elsewhere there are none, and a note
    says why."""
    program, listings = _read(engine)
    seconds, step, notes = _measured(engine, steps)
    ran = {phase: _Reader(engine, program, listings, found["parts"], steps, phase).ran() for phase in PHASES}
    origins: Origins = found["model"]
    layers: list[CompiledLayer] = []
    folded: set[str] = set()
    for phase in PHASES:
        times = seconds if phase == "decode" else {}
        made, away = _layers(ran[phase], origins, phase, times)
        layers += made
        folded |= set(away)
    compiled = engine.manifest.compiled
    assert compiled is not None
    notes.append(f"{compiled.library}, attention hosted {compiled.hosting}, products by {compiled.products}")
    layers = _both(layers)
    settings = steps.to_dict() if seconds else {}
    return EngineLayers(
        engine.path.name, engine.manifest.target, tuple(layers), tuple(sorted(folded)), step, {}, settings, tuple(notes)
    )


def _read(engine: Engine) -> tuple[Program, dict[str, tuple[Layer, ...]]]:
    """The program, and the layers of each plan by the place of the step that runs it. Raises EngineError for files that aren't these."""
    try:
        program = Program.from_dict(read_json(engine.path / PROGRAM, EngineError))
        data = read_json(engine.path / LAYERS, EngineError)
        keys = {str(part["plan"]): str(part["key"]) for part in data["parts"]}
        by_key = {key: _listed(given) for key, given in data["layers"].items()}
        return program, {plan: by_key.get(key, ()) for plan, key in keys.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise EngineError(f"{engine.path}: altered, build the engine again ({problem})") from problem


def _listed(given: Any) -> tuple[Layer, ...]:
    """Nothing where the build couldn't list them."""
    if isinstance(given, str):
        return parse_listing(given).layers
    return layers_of(given) if isinstance(given, dict) else ()


def _measured(engine: Engine, steps: Steps) -> tuple[dict[int, float], dict[str, float], list[str]]:
    """Seconds of a decode step by place in the program and as a whole; nothing, and a note that says why, where it can't run."""
    from llmlab.runtime.backends.tensorrt.open import open_backend

    try:
        backend = open_backend(
            engine.path, engine.manifest, max_num_seqs=steps.batch, kv_blocks=None, kv_memory_fraction=None
        )
    except LlmlabError as problem:
        return {}, {}, [f"times are not measured here: {problem}"]
    try:
        profile = backend.profile(steps.batch, steps.context + 1, repeats=steps.repeat)
    finally:
        backend.close()
    note = "times are of a decode step, of each plan as a whole; prompts are not timed by layers"
    times = {at: step.ms / 1e3 for at, step in enumerate(profile.steps)}
    return times, {"decode": profile.step_ms / 1e3}, [note]


class _Reader:
    """What runs in one phase."""

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

    def ran(self) -> list[_Ran]:
        found: list[_Ran] = []
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
                found.append(_Ran(at, (step.name,), "norm kernel", dtype, held, moved))
            else:
                found.append(self._attend(at, step))
        return found

    def _plan(self, at: int, step: RunPlan, nodes: Sequence[str], names: Mapping[str, str]) -> list[_Ran]:
        layers = [x for x in self._of_phase(self._listings.get(step.plan, ())) if x.kind not in _IDLE]
        if not layers:
            return [_Ran(at, tuple(nodes), "a plan whose layers were not listed", "")]
        ran = []
        for layer in layers:
            mine = tuple(names[n] for n in _nodes(layer, list(names)) if n in names)
            weights = sum(self._bytes(v) for v in layer.constants)
            moved = weights + sum(self._bytes(v) for v in (*layer.inputs, *layer.outputs))
            if layer.kind.startswith("Plugin"):
                ran.append(self._plugin(at, layer, mine))
                continue
            matrix = _matrix(layer) if "product" in {kind_of((operator(n),)) for n in mine} else None
            flops = 2 * self._rows["T"] * matrix.shape[0] * matrix.shape[1] if matrix is not None else 0
            ran.append(_Ran(at, mine, _what(layer), _precision(layer), weights, moved, flops))
        return ran

    def _plugin(self, at: int, layer: Layer, nodes: tuple[str, ...]) -> _Ran:
        """Attention inside a plan: its pool is [2, blocks, kv_heads, tokens, channels], of which it touches the sequences' keys."""
        looked, touched = self._steps.keys(self._phase)
        pool = next((v for v in layer.inputs if len(v.shape) == 5), None)
        rows = [v for v in (*layer.inputs, *layer.outputs) if len(v.shape) == 2]
        width = layer.outputs[0].shape[-1] if layer.outputs else 0
        cache = 0 if pool is None else 2 * pool.shape[2] * pool.shape[4] * BITS[self._kv.dtype] // 8 * touched
        moved = cache + sum(map(self._bytes, rows))
        dtype = _precision(layer)
        return _Ran(
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
        profiles = _profiles(layers)
        wanted = 0 if self._phase == "decode" else max(profiles, default=0)
        return [layer for layer, profile in zip(layers, profiles, strict=True) if profile == wanted]

    def _multiply(self, at: int, step: Multiply) -> _Ran:
        x = self._program.tensors[step.x.tensor].dtype
        rows = self._rows_of(step.out)
        wide = step.width * (2 if step.gate else 1)
        weights = sum(self._weight(name) for name in (step.weight, step.scale, step.bias) if name)
        moved = weights + rows * (step.depth + step.width * (2 if step.add else 1)) * BITS[x] // 8
        more = [f"{step.gate} gate" if step.gate else "", "bias" if step.bias else "", "residual" if step.add else ""]
        what = " + ".join(["product kernel", *filter(None, more)])
        acts = step.rounded or x
        dtype = step.weight_dtype if step.weight_dtype == acts and not step.rounded else f"{step.weight_dtype} × {acts}"
        return _Ran(at, (step.name,), what, dtype, weights, moved, 2 * rows * wide * step.depth)

    def _attend(self, at: int, step: Attend) -> _Ran:
        x = self._program.tensors[step.out].dtype
        looked, touched = self._steps.keys(self._phase)
        cache = 2 * step.kv_heads * step.head_dim * BITS[self._kv.dtype] // 8 * touched
        width = 2 * step.num_heads + 2 * step.kv_heads
        moved = cache + self._rows["T"] * width * step.head_dim * BITS[x] // 8
        dtype = x if self._kv.dtype == x else f"{x}, cache {self._kv.dtype}"
        return _Ran(at, (step.name,), "attention kernel", dtype, 0, moved, 4 * step.num_heads * step.head_dim * looked)

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


def _layers(
    ran: Sequence[_Ran], origins: Origins, phase: str, seconds: Mapping[int, float]
) -> tuple[list[CompiledLayer], list[str]]:
    """Layers of one phase. Where steps of the program are timed, what runs in one of them is one layer."""
    steps: dict[int, list[int]] = {}
    for i, entry in enumerate(ran):
        steps.setdefault(entry.step, []).append(i)
    split = list(steps.values()) if seconds else [[i] for i in range(len(ran))]
    second = [
        Origin(tuple(dict.fromkeys(n for i in group for n in ran[i].nodes)), tuple(str(i) for i in group))
        for group in split
    ]
    groups, away = join_groups(origins, second)
    ordered: list[Group] = sorted(
        ((nodes, tuple(sorted(made, key=int))) for nodes, made in groups), key=lambda group: int(group[1][0])
    )
    kinds = [_kind(nodes, origins) for nodes, _ in ordered]
    names = name_layers([nodes for nodes, _ in ordered], kinds, [ran[int(made[0])].what for _, made in ordered])
    layers = []
    for name, kind, (nodes, made) in zip(names, kinds, ordered, strict=True):
        mine = [ran[int(i)] for i in made]
        times = [seconds[at] for at in dict.fromkeys(entry.step for entry in mine) if at in seconds]
        heaviest = max(mine, key=lambda entry: (entry.flops, entry.weight_bytes))
        layers.append(
            CompiledLayer(
                name,
                kind,
                nodes,
                tuple(entry.what for entry in mine),
                heaviest.dtype,
                {phase: sum(times)} if times else {},
                sum(entry.weight_bytes for entry in mine),
                {phase: sum(entry.bytes for entry in mine)},
                {phase: sum(entry.flops for entry in mine)},
                (phase,),
            )
        )
    return layers, away


def _both(layers: list[CompiledLayer]) -> list[CompiledLayer]:
    """Decode and prefill have plans of their own where they differ; what is the same in both is one layer."""
    decode = {_same(x): x for x in layers if x.phases == ("decode",)}
    prefill = {_same(x): x for x in layers if x.phases == ("prefill",)}
    merged = []
    for key, one in decode.items():
        two = prefill.pop(key, None)
        if two is None:
            merged.append(one)
            continue
        whole = {**vars(one), "phases": PHASES}
        for name in ("seconds", "bytes", "flops"):
            whole[name] = {**getattr(one, name), **getattr(two, name)}
        merged.append(CompiledLayer(**whole))
    return merged + list(prefill.values())


def _same(layer: CompiledLayer) -> tuple[object, ...]:
    return layer.name, layer.kind, layer.nodes, layer.kernels, layer.dtype


def _kind(nodes: Sequence[str], origins: Origins) -> str:
    ops = [origins.ops[node] for node in nodes]
    kind = kind_of(ops)
    looks_up = any("embed" in node and op == "Gather" for node, op in zip(nodes, ops, strict=True))
    return "embedding" if kind == "rest" and looks_up else kind


def _profiles(layers: Sequence[Layer]) -> list[int]:
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


def _nodes(layer: Layer, known: Sequence[str]) -> list[str]:
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
