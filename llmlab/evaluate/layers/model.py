"""Layers of an engine as plain data: what each computes, in which types, how long it takes, how many bytes it reads and writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from llmlab.graph.reports.fold import block_of, layer_of
from llmlab.graph.reports.render import as_text, plain

PHASES = ("decode", "prefill")
KINDS = ("attention", "product", "experts", "norm", "embedding", "rest")
"""What a layer does. product: a linear layer with all that was fused to it."""

_OPS = {
    "attention": "PagedAttention Attention GroupQueryAttention",
    "experts": "MixtureOfExperts MoE QMoE",
    "product": "MatMul Gemm MatMulNBits MatMulIntegerToFloat MatMulInteger FusedMatMul FusedGemm DynamicQuantizeMatMul QGemm QLinearMatMul Product Conv",
    "norm": "RMSNormalization LayerNormalization SimplifiedLayerNormalization SkipSimplifiedLayerNormalization SkipLayerNormalization RowNorm",
}
_KIND_OF = {op: kind for kind, ops in _OPS.items() for op in ops.split()}
_NUMBER = re.compile(r"(?<=\.)\d+(?=[./]|$)")


@dataclass(frozen=True)
class CompiledLayer:
    """What an engine runs that can be held against the serving graph: the fewest kernels that compute a set of whole nodes."""

    name: str
    """The place in the model, such as `model.layers.3.self_attn`, and what makes it one of its own there."""
    kind: str
    """One of KINDS."""
    nodes: tuple[str, ...]
    """Names of the serving graph's nodes; empty for what the compiler added."""
    kernels: tuple[str, ...]
    """What runs, in the compiler's words, in order."""
    dtype: str
    """What it computes in; of products weights × activations, such as `int4 × int8`."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of one step by phase, the middle one of the runs; empty where it wasn't measured."""
    weight_bytes: int = 0
    bytes: Mapping[str, int] = field(default_factory=dict)
    """Read and written in a step by phase, weights and KV cache among them."""
    flops: Mapping[str, int] = field(default_factory=dict)
    """Of its products and attention in a step by phase; a multiplication and an addition are two."""
    phases: tuple[str, ...] = PHASES
    """In which steps it runs: an engine can have a model of its own for prompts."""

    @property
    def layer(self) -> str:
        """`model.layers.3`, or the module of what belongs to no transformer layer."""
        return layer_of(self.name)

    @property
    def block(self) -> str:
        """`model.layers.3.self_attn`."""
        return block_of(self.name)

    @property
    def alike(self) -> str:
        """The name without the number of its layer: the same for layers that differ in it alone."""
        return _NUMBER.sub("*", self.name, count=1)


@dataclass(frozen=True)
class Row:
    """Layers that differ in the number of their transformer layer alone."""

    name: str
    layers: tuple[CompiledLayer, ...]

    @classmethod
    def of(cls, layers: Sequence[CompiledLayer]) -> Row:
        return cls(_together(layers), tuple(layers))

    @property
    def first(self) -> CompiledLayer:
        return self.layers[0]

    def seconds(self, phase: str) -> float | None:
        """Of all of them together in one step."""
        times = self.times(phase)
        return sum(times) if times else None

    def times(self, phase: str) -> list[float]:
        return [layer.seconds[phase] for layer in self.layers if phase in layer.seconds]

    def each(self, phase: str) -> str:
        """The time of one: a number, or from the fastest to the slowest."""
        times = sorted(self.times(phase))
        if not times:
            return ""
        low, high = microseconds(times[0]), microseconds(times[-1])
        return low if len(times) == 1 else f"{low}–{high}"


@dataclass(frozen=True)
class EngineLayers:
    """What a compiler made of a serving graph, in the order in which it runs."""

    engine: str
    target: str
    layers: tuple[CompiledLayer, ...]
    folded: tuple[str, ...]
    """Serving-graph nodes that nothing is left of: computed while weights were written, or of no use."""
    step: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a whole step by phase, as the engine runs without a profiler: the mean of the fastest quarter of the runs."""
    between: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a step, while each layer was timed, that no layer has: between kernels."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What was run: context, prompt, batch, threads, repeats."""
    notes: tuple[str, ...] = ()
    """What is not known here, and why."""

    @property
    def phases(self) -> tuple[str, ...]:
        """Those that were measured."""
        return tuple(phase for phase in PHASES if any(phase in layer.seconds for layer in self.layers))

    def rows(self, keep: Callable[[CompiledLayer], bool] | None = None) -> list[Row]:
        """Layers that are alike as one row, in running order; `keep` chooses among them."""
        found: dict[tuple[object, ...], list[CompiledLayer]] = {}
        for layer in self.layers:
            if keep is None or keep(layer):
                work = (layer.kind, layer.dtype, layer.phases, tuple(layer.flops.values()))
                found.setdefault((layer.alike, *layer.kernels, *work), []).append(layer)
        return [Row.of(alike) for alike in found.values()]

    def totals(self, by: Callable[[CompiledLayer], str], phase: str) -> dict[str, float]:
        """Seconds of a step by what `by` says of a layer, most first; without times, how many layers there are."""
        measured = phase in self.phases
        sums: dict[str, float] = {}
        for layer in self.layers:
            sums[by(layer)] = sums.get(by(layer), 0.0) + (layer.seconds.get(phase, 0.0) if measured else 1)
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def bytes(self, phase: str) -> int:
        """Read and written in a step."""
        return sum(layer.bytes.get(phase, 0) for layer in self.layers)

    def flops(self, phase: str) -> int:
        """Of a step; a multiplication and an addition are two."""
        return sum(layer.flops.get(phase, 0) for layer in self.layers)

    def by_node(self, phase: str = "decode") -> dict[str, float]:
        """{serving-graph node: seconds of a step}; the sum is that of all layers that compute any.

        A layer that computes several nodes has its time on the one that is its reason (attention, the product, the norm), the
        others have 0. Empty where nothing was measured.
        """
        found: dict[str, float] = {}
        for layer in self.layers:
            if layer.nodes and phase in layer.seconds:
                found |= dict.fromkeys(layer.nodes, 0.0)
                found[main_node(layer.nodes, layer.kind)] = layer.seconds[phase]
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "target": self.target,
            "layers": [{**asdict(layer), "layer": layer.layer, "block": layer.block} for layer in self.layers],
            "folded": list(self.folded),
            "step": dict(self.step),
            "between": dict(self.between),
            "settings": dict(self.settings),
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        times = "".join(f", {phase} {milliseconds(self.step[phase])}" for phase in self.phases)
        return f"EngineLayers({self.engine}, {self.target}, {len(self.layers)} layers{times})"

    def __str__(self) -> str:
        return as_text(self, 120)

    def __rich__(self) -> RenderableType:
        phases = self.phases
        total = {phase: sum(layer.seconds.get(phase, 0.0) for layer in self.layers) or 1.0 for phase in phases}
        table = Table(box=None, pad_edge=False)
        for head in ("layer", "precision", "what runs"):
            table.add_column(head, overflow="fold")
        for phase in phases:
            table.add_column(f"{phase}: share, each", justify="right", overflow="fold")
        for row in sorted(self.rows(), key=lambda r: -(r.seconds(phases[0]) or 0.0)) if phases else self.rows():
            only = "" if row.first.phases == PHASES else f" ({', '.join(row.first.phases)} alone)"
            cells = [row.name + only, row.first.dtype, " ".join(row.first.kernels)]
            for phase in phases:
                seconds = row.seconds(phase)
                cells.append("" if seconds is None else f"{seconds / total[phase]:.1%} {row.each(phase)}")
            table.add_row(*map(plain, cells))
        notes = [*self.notes, f"{len(self.folded)} nodes were computed before it runs, or are of no use"]
        return Group(plain(repr(self), "bold"), table, *map(plain, notes))


def kind_of(ops: Iterable[str]) -> str:
    """What a layer that consists of these operators does."""
    kinds = {_KIND_OF.get(op, "rest") for op in ops}
    return next((kind for kind in KINDS if kind in kinds), "rest")


def main_node(nodes: Iterable[str], kind: str) -> str:
    """The node that is a layer's reason; by name, whose end is its operator."""
    known = list(nodes)
    return next((n for n in known if _KIND_OF.get(operator(n), "rest") == kind), known[-1])


def operator(node: str) -> str:
    """`MatMul` of `model.layers.3.mlp/MatMul_1`."""
    return re.sub(r"_\d+$", "", node.rpartition("/")[2])


def name_layers(given: Iterable[tuple[str, ...]], kinds: Iterable[str], kernels: Iterable[str]) -> list[str]:
    """A name for each layer: the module of its main node, with the operator where a module has several layers."""
    places = []
    for nodes, kind, kernel in zip(given, kinds, kernels, strict=True):
        node = main_node(nodes, kind) if nodes else kernel
        places.append((node.rpartition("/")[0] or node, operator(node)))
    count: dict[str, int] = {}
    for module, _ in places:
        count[module] = count.get(module, 0) + 1
    names: list[str] = []
    used: dict[str, int] = {}
    for module, op in places:
        name = module if count[module] == 1 else f"{module}/{op}"
        used[name] = used.get(name, 0) + 1
        names.append(name if used[name] == 1 else f"{name} {used[name]}")
    return names


def _together(layers: Sequence[CompiledLayer]) -> str:
    """One name for layers that are alike: `model.layers.0–5.mlp`."""
    if len(layers) == 1:
        return layers[0].name
    numbers = sorted(int(found.group()) for layer in layers if (found := _NUMBER.search(layer.name)))
    if not numbers:
        return f"{layers[0].name} ({len(layers)}×)"
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number <= parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    texts = [str(a) if a == b else f"{a}–{b}" for a, b in parts]
    shown = ",".join(texts if len(texts) <= 3 else [*texts[:2], "…", texts[-1]])
    return layers[0].alike.replace("*", shown, 1) + f" ({len(layers)}×)"


def microseconds(seconds: float) -> str:
    """`3.4 µs`, `120 µs`, `4.31 ms`."""
    micro = seconds * 1e6
    if micro >= 1000:
        return milliseconds(seconds)
    return f"{micro:.0f} µs" if micro >= 10 else f"{micro:.1f} µs"


def milliseconds(seconds: float) -> str:
    milli = seconds * 1e3
    return f"{milli:.0f} ms" if milli >= 100 else f"{milli:.1f} ms" if milli >= 10 else f"{milli:.2f} ms"
