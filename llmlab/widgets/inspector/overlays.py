"""Numbers that are laid over a graph: bytes, operations, time, quantization error, precision. They sum up the hierarchy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import onnx_graphsurgeon as gs

from llmlab.graph.reports.fold import natural
from llmlab.widgets.inspector.flops import COUNTED, flops
from llmlab.widgets.inspector.hierarchy import Fold, Group, Leaf
from llmlab.widgets.inspector.sizes import bytes_text, is_weight, number_text, parameters, time_text, type_of

_NOTHING: Counter[str] = Counter()
COLORS = ("--ll-0", "--ll-1", "--ll-2", "--ll-3", "--ll-4", "--ll-5", "--ll-6", "--ll-7")


class Sum(NamedTuple):
    """What an overlay says of a part of the graph: as text, as a number to compare, and its colour."""

    text: str
    value: float
    color: str


@dataclass
class Overlay:
    """A number at each node that has one. missing: what to do where nothing is known."""

    name: str
    label: str
    says: str
    """One line: what the number is."""
    values: Mapping[str, float]
    text: Callable[[float], str]
    missing: str = ""
    known: dict[int, Sum] = field(default_factory=dict, repr=False)

    def at(self, row: Leaf | Fold | Group) -> Sum:
        """The sum over a row of the tree, computed once."""
        if id(row) not in self.known:
            leaves = [row] if isinstance(row, Leaf) else list(row.leaves)
            self.known[id(row)] = Sum(self.shown(leaves), self.share(leaves, 1.0), self.color(leaves))
        return self.known[id(row)]

    def color(self, leaves: Iterable[Leaf]) -> str:
        """A colour of its own, where there is one."""
        return ""

    def of(self, leaves: Iterable[Leaf]) -> float:
        """The sum over nodes."""
        return sum(self.values.get(leaf.name, 0.0) for leaf in leaves)

    def shown(self, leaves: Iterable[Leaf]) -> str:
        """The sum as text; empty where no node has a number."""
        total = self.of(leaves)
        return self.text(total) if total else ""

    def share(self, leaves: Iterable[Leaf], whole: float) -> float:
        return self.of(leaves) / whole if whole else 0.0


@dataclass
class ErrorOverlay(Overlay):
    """values: the squared error of each node's quantized weight; norms: the squared weight. Shown is the root of their ratio."""

    norms: Mapping[str, float] = field(default_factory=dict)

    def relative(self, leaves: Iterable[Leaf]) -> float:
        known = [leaf.name for leaf in leaves if leaf.name in self.norms]
        norm = sum(self.norms[name] for name in known)
        return (sum(self.values[name] for name in known) / norm) ** 0.5 if norm else 0.0

    def shown(self, leaves: Iterable[Leaf]) -> str:
        leaves = list(leaves)
        if not any(leaf.name in self.norms for leaf in leaves):
            return ""
        return f"{self.relative(leaves):.2%}"

    def share(self, leaves: Iterable[Leaf], whole: float) -> float:
        """How large the error is in comparison, `whole` being the largest; a sum of relative errors means nothing."""
        return self.relative(leaves) / whole if whole else 0.0


@dataclass
class PrecisionOverlay(Overlay):
    """values: bytes of weights, as those of the overlay of bytes. types: of each node's weights, or else its result."""

    types: Mapping[str, Counter[str]] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=dict)

    def count(self, leaves: Iterable[Leaf]) -> Counter[str]:
        """Bytes of weights by type; types of results, with 0 bytes, where there are no weights."""
        leaves = list(leaves)
        total: Counter[str] = Counter()
        for leaf in leaves:
            for kind, size in self.types.get(leaf.name, _NOTHING).items():
                total[kind] += size
        return total or Counter({self.activations[leaf.name]: 0 for leaf in leaves if leaf.name in self.activations})

    def shown(self, leaves: Iterable[Leaf]) -> str:
        count = self.count(leaves)
        whole = sum(count.values())
        if not whole:
            return ", ".join(sorted(count)[:3])
        kinds = [f"{kind} {size / whole:.0%}" if len(count) > 1 else kind for kind, size in count.most_common(3)]
        return "weights " + ", ".join(kinds)

    @cached_property
    def kinds(self) -> list[str]:
        """All types, in the order of their colours."""
        return sorted(
            {kind for count in self.types.values() for kind in count} | set(self.activations.values()), key=natural
        )

    def color(self, leaves: Iterable[Leaf]) -> str:
        """Of the type that most bytes have."""
        most = self.count(leaves).most_common(1)
        return self.color_of(most[0][0]) if most else ""

    def color_of(self, kind: str) -> str:
        return f"var({COLORS[self.kinds.index(kind) % len(COLORS)]})"


def constant_bytes(leaves: Iterable[Leaf]) -> tuple[dict[str, float], dict[str, float], dict[str, Counter[str]]]:
    """(bytes, parameters, bytes of weights by type) of the constants by node. One that several nodes read counts at the first."""
    sizes: dict[str, float] = {}
    counts: dict[str, float] = {}
    types: dict[str, Counter[str]] = {}
    seen: set[int] = set()
    for leaf in leaves:
        for tensor in leaf.node.inputs:
            if not isinstance(tensor, gs.Constant) or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            size = int(tensor._values.nbytes)
            sizes[leaf.name] = sizes.get(leaf.name, 0) + size
            if number := parameters(leaf.node, tensor):
                counts[leaf.name] = counts.get(leaf.name, 0) + number
            if is_weight(tensor):
                types.setdefault(leaf.name, Counter())[type_of(tensor)] += size
    return sizes, counts, types


def overlays(leaves: list[Leaf], context: int) -> dict[str, Overlay]:
    """Those that a graph alone has; times and errors are `time_overlay` and `error_overlay`."""
    sizes, counts, types = constant_bytes(leaves)
    results = {leaf.name: type_of(leaf.node.outputs[0]) for leaf in leaves if leaf.node.outputs}
    made = [
        Overlay("bytes", "bytes of weights", "constants, each counted where it is first read", sizes, bytes_text),
        Overlay("parameters", "parameters", "numbers in weights, without scales and tables", counts, number_text),
        flops_overlay(leaves, context),
        PrecisionOverlay(
            "precision",
            "precision",
            "types of weights by bytes, else of what comes out",
            sizes,
            bytes_text,
            types=types,
            activations=results,
        ),
    ]
    return {overlay.name: overlay for overlay in made}


def flops_overlay(leaves: Iterable[Leaf], context: int) -> Overlay:
    """Operations of one token that attends to `context` keys."""
    says = f"floating-point operations of one token at a context of {context:,}, of {', '.join(COUNTED)}; others aren't counted"
    counts = {leaf.name: value for leaf in leaves if not leaf.prepares and (value := flops(leaf.node, context))}
    return Overlay("flops", "operations per token", says, counts, lambda value: number_text(value, "FLOP"))


def time_overlay(seconds: Mapping[str, float], phase: str = "", missing: str = "") -> Overlay:
    """Measured times by node name, of a step of `phase` where there are several."""
    says = f"measured time of a {phase or 'whole'} step" if seconds else "not measured"
    if not seconds and not missing:
        missing = "nothing is measured: give engine=, and press Measure, or times={node name: seconds}"
    return Overlay(
        f"time {phase}".strip(),
        f"measured time, {phase}" if phase else "measured time",
        says,
        dict(seconds),
        time_text,
        missing,
    )


def error_overlay(found: Mapping[str, tuple[float, float]], missing: str = "") -> ErrorOverlay:
    """(squared error, squared weight) by the name of the node that dequantizes it."""
    says = "‖W − quantized W‖ / ‖W‖ against the reference graph"
    errors, norms = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
    return ErrorOverlay("error", "quantization error", says, errors, number_text, missing, norms=norms)
