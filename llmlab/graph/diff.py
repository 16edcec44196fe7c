"""What changed between two graphs: nodes added, removed and changed, grouped by layer."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import onnx_graphsurgeon as gs


def layer_of(node_name: str) -> str:
    """The layer that a node belongs to: `model.layers.3` of `model.layers.3.mlp/MatMul`, else its module."""
    module = node_name.partition("/")[0]
    layer = re.match(r"(.*?\.\d+)(\.|$)", module)
    return layer.group(1) if layer else module


@dataclass(frozen=True)
class GraphDiff:
    """Node names of two versions of a graph, compared. A node is `changed` where its operator, inputs or attributes are."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    ops: dict[str, int] = field(default_factory=dict)
    """Change in the number of nodes by operator; zeros left out."""

    def by_layer(self) -> dict[str, dict[str, int]]:
        """`{layer: {"added": n, "removed": n, "changed": n}}` for every layer that something changed in."""
        table: dict[str, Counter[str]] = {}
        for what in ("added", "removed", "changed"):
            for name in getattr(self, what):
                table.setdefault(layer_of(name), Counter())[what] += 1
        return {
            layer: {w: counts[w] for w in ("added", "removed", "changed")} for layer, counts in sorted(table.items())
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "added": list(self.added),
            "removed": list(self.removed),
            "changed": list(self.changed),
            "ops": dict(self.ops),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GraphDiff:
        return cls(tuple(data["added"]), tuple(data["removed"]), tuple(data["changed"]), dict(data["ops"]))


Snapshot = dict[str, tuple[str, ...]]


def snapshot(graph: gs.Graph) -> Snapshot:
    """What `diff` compares: by node name, the operator, its inputs and its attributes."""
    return {
        n.name: (n.op, *(t.name for t in n.inputs), *(f"{k}={_brief(v)}" for k, v in sorted(n.attrs.items())))
        for n in graph.nodes
    }


def _brief(value: Any) -> str:
    return f"{type(value).__name__}{getattr(value, 'shape', '')}" if isinstance(value, gs.Tensor) else str(value)


def diff(before: Snapshot, after: Snapshot) -> GraphDiff:
    """Compare two snapshots."""
    ops = Counter(v[0] for v in after.values())
    ops.subtract(Counter(v[0] for v in before.values()))
    return GraphDiff(
        added=tuple(n for n in after if n not in before),
        removed=tuple(n for n in before if n not in after),
        changed=tuple(n for n in after if n in before and before[n] != after[n]),
        ops={op: n for op, n in sorted(ops.items()) if n},
    )
