"""Layers of an ONNX Runtime engine: its optimized model beside the origins that the build wrote, timed by its own profiler."""

from __future__ import annotations

import tempfile
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from llmlab.errors import EngineError
from llmlab.evaluate.layers.groups import Group, join_groups
from llmlab.evaluate.layers.model import PHASES, CompiledLayer, EngineLayers, kind_of, name_layers
from llmlab.evaluate.layers.profile import Event, byte_size, read_profile
from llmlab.evaluate.layers.steps import Steps
from llmlab.graph.lower.origins import Origins, match
from llmlab.kernels.kv_cache import BITS
from llmlab.runtime.backends.onnxruntime import OnnxRuntimeBackend
from llmlab.runtime.engine import Engine
from llmlab.runtime.manifest import MODEL, PREFILL_MODEL, Manifest

_LEVELS = {1: "float32", 4: "int8"}
_INTEGERS = frozenset(("MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"))


def read_layers(
    engine: Engine,
    found: Mapping[str, Origins],
    steps: Steps,
    threads: int | None,
    stop: threading.Event | None,
) -> EngineLayers:
    """Run `steps` twice, without and with the profiler. found: the engine's origins by model file."""
    manifest = engine.manifest
    plain = OnnxRuntimeBackend(engine.path, manifest, threads=threads, num_slots=steps.batch)
    taken = steps.run(plain.execute, plain.limits.vocab_size, stop)
    step = {phase: steps.best(times) for phase, times in taken.items()}
    plain.close()
    with tempfile.TemporaryDirectory(prefix="llmlab-layers-") as folder:
        backend = OnnxRuntimeBackend(
            engine.path, manifest, threads=threads, num_slots=steps.batch, profile=Path(folder)
        )
        counts = {p: len(t) for p, t in steps.run(backend.execute, backend.limits.vocab_size, stop).items()}
        written = backend.end_profiling()
        backend.close()
        models = {optimized.name: _nodes(optimized) for optimized, _ in written}
        runs = {optimized.name: read_profile(profile) for optimized, profile in written}
    sessions = _by_phase({name: len(r) for name, r in runs.items()}, counts)
    layers: list[CompiledLayer] = []
    folded: set[str] = set()
    between: dict[str, float] = {}
    for model in dict.fromkeys(sessions.values()):
        phases = [p for p in PHASES if sessions[p] == model]
        lowered = _nodes(engine.path / model)
        reader = _Reader(models[model], steps, manifest)
        at = 0
        for phase in phases:
            mine = runs[model][at : at + counts[phase]]
            at += counts[phase]
            kept = steps.counted(mine)
            between[phase] = median(run.seconds - sum(e.seconds for e in run.events) for run in kept)
            reader.take(phase, [run.events for run in kept])
        groups, away = join_groups(found[model], match(lowered, models[model])[0])
        folded |= set(away)
        layers += reader.layers(groups, tuple(phases))
    settings = {**steps.to_dict(), "threads": backend.threads}
    notes = () if len(set(sessions.values())) == 1 else ("decode and prefill run in models of their own",)
    return EngineLayers(
        engine.path.name, manifest.target, tuple(layers), tuple(sorted(folded)), step, between, settings, notes
    )


def _nodes(path: Path) -> list[gs.Node]:
    """The nodes of a model whose weights aren't read; each has a name."""
    graph = gs.import_onnx(onnx.load(path, load_external_data=False))
    taken = Counter(node.name for node in graph.nodes)
    for number, node in enumerate(graph.nodes):
        if not node.name or taken[node.name] > 1:
            node.name = f"{node.name or node.op} #{number}"
    return list(graph.nodes)


def _by_phase(runs: Mapping[str, int], counts: Mapping[str, int]) -> dict[str, str]:
    """Which model ran each phase: by how many runs each made."""
    if runs.get(PREFILL_MODEL, 0) == 0:
        made = dict.fromkeys(PHASES, MODEL)
    elif runs[MODEL] == 0:
        made = dict.fromkeys(PHASES, PREFILL_MODEL)
    else:
        made = {"decode": MODEL, "prefill": PREFILL_MODEL}
    if any(runs[m] != sum(counts[p] for p in PHASES if made[p] == m) for m in set(made.values())):
        raise EngineError(f"{sum(counts.values())} steps made {sum(runs.values())} runs: they can't be told apart")
    return made


@dataclass
class _Kernel:
    """One node of the optimized model and what was measured of it."""

    node: gs.Node
    seconds: dict[str, float]
    bytes: dict[str, int]
    flops: dict[str, int]


class _Reader:
    """Puts what was measured on the nodes of an optimized model."""

    def __init__(self, nodes: Sequence[gs.Node], steps: Steps, manifest: Manifest) -> None:
        self._kernels = {node.name: _Kernel(node, {}, {}, {}) for node in nodes}
        self._steps, self._manifest = steps, manifest
        self._types: dict[str, str] = {}

    def take(self, phase: str, runs: Sequence[Sequence[Event]]) -> None:
        times: dict[str, list[float]] = {}
        events: dict[str, Event] = {}
        for run in runs:
            for event in run:
                times.setdefault(event.name, []).append(event.seconds)
                events[event.name] = event
        for name, event in events.items():
            if name not in self._kernels:  # put in while the session was made: it is in no model
                node = gs.Node(event.op, name)
                self._kernels[name] = _Kernel(node, {}, {}, {})
            kernel = self._kernels[name]
            kernel.seconds[phase] = median(times[name])
            kernel.bytes[phase], kernel.flops[phase] = self._work(kernel.node, event, phase)
            self._types[name] = next((dtype for dtype, _ in event.outputs), "")

    def layers(self, groups: Sequence[Group], phases: tuple[str, ...]) -> list[CompiledLayer]:
        """One for each group, and one for each kernel that is in none."""
        known = {name for _, made in groups for name in made}
        alone: list[Group] = [((), (name,)) for name in self._kernels if name not in known]
        place = {name: i for i, name in enumerate(self._kernels)}
        whole = [(nodes, tuple(sorted(made, key=place.__getitem__))) for nodes, made in (*groups, *alone)]
        ordered = sorted(whole, key=lambda group: place[group[1][0]])
        kinds = [self._kind([self._kernels[name].node for name in made]) for _, made in ordered]
        names = name_layers([nodes for nodes, _ in ordered], kinds, [made[0] for _, made in ordered])
        return [
            self._layer(name, kind, nodes, made, phases)
            for name, kind, (nodes, made) in zip(names, kinds, ordered, strict=True)
        ]

    def _layer(
        self, name: str, kind: str, nodes: tuple[str, ...], made: tuple[str, ...], phases: tuple[str, ...]
    ) -> CompiledLayer:
        kernels = [self._kernels[name] for name in made]
        measured = [p for p in phases if any(p in k.seconds for k in kernels)]
        weights = {t.name: _stored(t) for k in kernels for t in k.node.inputs if isinstance(t, gs.Constant)}
        return CompiledLayer(
            name,
            kind,
            nodes,
            tuple(k.node.op for k in kernels),
            self._precision(kind, kernels),
            {p: sum(k.seconds.get(p, 0.0) for k in kernels) for p in measured},
            sum(weights.values()),
            {p: sum(k.bytes.get(p, 0) for k in kernels) for p in measured},
            {p: sum(k.flops.get(p, 0) for k in kernels) for p in measured},
            phases,
        )

    @staticmethod
    def _kind(nodes: Sequence[gs.Node]) -> str:
        kind = kind_of(node.op for node in nodes)
        looks_up = [n for n in nodes if n.op == "Gather" and isinstance(n.inputs[0], gs.Constant)]
        return "embedding" if kind == "rest" and any(len(n.inputs[0].shape) == 2 for n in looks_up) else kind

    def _precision(self, kind: str, kernels: Sequence[_Kernel]) -> str:
        nodes = [k.node for k in kernels]
        for node in nodes:
            if node.op == "MatMulNBits":
                return f"int{node.attrs['bits']} × {_LEVELS.get(node.attrs.get('accuracy_level', 0), 'float32')}"
            if node.op in _INTEGERS:
                return "int8 × int8"
        wide = next((t for n in nodes if (t := self._types.get(n.name))), "")
        wide = {"float": "float32", "double": "float64"}.get(wide, wide)
        if kind == "attention" and self._manifest.kv.dtype != wide:
            return f"{wide}, cache {self._manifest.kv.dtype}"
        stored = [n for n in nodes if n.op == "DequantizeLinear" and isinstance(n.inputs[0], gs.Constant)]
        return f"{np.dtype(stored[0].inputs[0].dtype).name} × {wide}" if stored else wide

    def _work(self, node: gs.Node, event: Event, phase: str) -> tuple[int, int]:
        """(bytes that a kernel reads and writes, operations of a product or of attention) in a step."""
        constants = [t for t in node.inputs if isinstance(t, gs.Constant)]
        rest = sum(byte_size(shape) for shape in event.outputs) + self._read(node, event)
        if node.op == "GroupQueryAttention":
            return self._attention(node, event, phase)
        if node.op == "Gather" and constants:
            return 2 * sum(byte_size(shape) for shape in event.outputs), 0
        return rest + sum(map(_stored, constants)), _multiplications(node, event)

    @staticmethod
    def _read(node: gs.Node, event: Event) -> int:
        """Bytes of what a kernel reads that is no weight. A profile names no tensors, so they are told by their place."""
        given = [t for t in node.inputs if t.name]
        if len(given) == len(event.inputs):
            return sum(byte_size(s) for t, s in zip(given, event.inputs, strict=True) if isinstance(t, gs.Variable))
        moving = sum(isinstance(t, gs.Variable) for t in given)  # packed weights are gone: they stand behind x
        return sum(byte_size(s) for s in event.inputs[:moving])

    def _attention(self, node: gs.Node, event: Event, phase: str) -> tuple[int, int]:
        kv = self._manifest.kv
        past = next(t.name for t in node.inputs if t.name.startswith("past_key."))
        heads, dim = kv.layers[int(past.rpartition(".")[2])]
        looked, touched = self._steps.keys(phase)
        moved = [*(s for s in event.inputs if len(s[1]) == 3), event.outputs[0]]
        cache = 2 * heads * dim * BITS[kv.dtype] // 8 * touched
        return sum(map(byte_size, moved)) + cache, 4 * int(node.attrs["num_heads"]) * dim * looked


def _multiplications(node: gs.Node, event: Event) -> int:
    """2 · M · N · K of a product, from the shape of its result; 0 for anything else."""
    if kind_of((node.op,)) != "product" or not event.outputs:
        return 0
    made = int(np.prod(event.outputs[0][1], dtype=np.int64))
    width = event.outputs[0][1][-1] if event.outputs[0][1] else 1
    if node.op == "MatMulNBits":
        return 2 * made * int(node.attrs["K"])
    depth = next((int(np.prod(t.shape)) // width for t in node.inputs if _is_matrix(t)), 0)
    if not depth and event.inputs and event.inputs[0][1]:  # two tensors of the step, or a weight that is unpacked first
        depth = event.inputs[0][1][-1]
    return 2 * made * depth


def _is_matrix(tensor: Any) -> bool:
    return isinstance(tensor, gs.Constant) and len(tensor.shape) == 2 and min(tensor.shape) > 1


def _stored(tensor: gs.Constant) -> int:
    """Bytes of a constant as a file holds it."""
    count = int(np.prod(tensor.shape, dtype=np.int64))
    dtype = np.dtype(tensor.dtype)
    return -(-count // 2) if dtype.name in ("int4", "uint4") else count * dtype.itemsize
