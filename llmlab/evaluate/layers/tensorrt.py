"""Layers of a TensorRT engine: what runs in its steps (`tensorrt_steps.py`), brought together with the nodes of the model and with times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmlab.errors import EngineError, LlmlabError
from llmlab.evaluate.layers.groups import Group, join_groups
from llmlab.evaluate.layers.model import PHASES, CompiledLayer, EngineLayers, kind_of, name_layers
from llmlab.evaluate.layers.steps import Steps
from llmlab.evaluate.layers.tensorrt_steps import Ran, Reader
from llmlab.files import read_json
from llmlab.graph.lower.origins import Origin, Origins
from llmlab.runtime.engine import Engine
from llmlab.runtime.manifest import LAYERS, PROGRAM
from llmlab.runtime.program import Program
from llmlab.tensorrt.inspect import layers_of
from llmlab.tensorrt.layers import Layer, parse_listing


def read_layers(engine: Engine, found: Mapping[str, Any], steps: Steps) -> EngineLayers:
    """found: what the build wrote of origins. Times are those of a GPU that can run the engine; elsewhere there are none, and a note
    says why."""
    program, listings = _read(engine)
    seconds, step, notes = _measured(engine, steps)
    ran = {phase: Reader(engine, program, listings, found["parts"], steps, phase).ran() for phase in PHASES}
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


def _layers(
    ran: Sequence[Ran], origins: Origins, phase: str, seconds: Mapping[int, float]
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
