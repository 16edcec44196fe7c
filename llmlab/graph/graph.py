"""`Graph`: an ONNX graph as the surgeon sees it, with its model's config, its tokenizer files and its history."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from llmlab.checkpoint import ASSETS
from llmlab.config import ModelConfig
from llmlab.errors import GraphError
from llmlab.files import atomic_folder, read_bytes, read_json, refuse_links, write_json
from llmlab.graph.reports.diff import GraphDiff, diff
from llmlab.graph.reports.quantization import QuantizationReport, read_report
from llmlab.graph.reports.report import History, PassReport
from llmlab.graph.reports.tables import NodeTable
from llmlab.graph.reports.why import Why, why
from llmlab.graph.store.references import References, open_references
from llmlab.graph.store.storage import MODEL, constants, read_onnx, write_onnx
from llmlab.provenance import Step

FORMAT = 1
"""Version of the folder that `Graph.save` writes."""
MANIFEST = "graph.json"

LLMLAB_DOMAIN = "llmlab"
OPSET = 23
TOKENS = "T"
"""The size, in declared shapes, of the axis that counts a step's tokens."""


@dataclass(frozen=True)
class KVLayer:
    """The KV cache that one attention layer wants."""

    name: str
    kv_heads: int
    head_dim: int
    dtype: np.dtype
    """float32, float16 or bfloat16; int8, int4 or float8_e4m3fn where the cache is quantized."""

    @classmethod
    def of(cls, node: gs.Node) -> KVLayer:
        """That of a PagedAttention node."""
        pool, attrs = node.inputs[3], node.attrs
        return cls(pool.name, attrs["kv_num_heads"], attrs["head_dim"], np.dtype(pool.dtype))


class Graph:
    """A model between two steps of the road: inspect it, save it, open it again, rewrite it.

    `surgeon` is the `onnx_graphsurgeon.Graph`; passes do surgery on its nodes. A node's name starts with the path
    of the module that made it: `model.layers.0.self_attn/MatMul_2`.
    """

    def __init__(
        self,
        surgeon: gs.Graph,
        config: ModelConfig,
        assets: dict[str, bytes] | None = None,
        history: Iterable[PassReport] = (),
        steps: Iterable[Step] = (),
    ) -> None:
        self.surgeon = surgeon
        self.config = config
        self.assets = dict(assets or {})
        self.history = History(history)
        self.steps = tuple(steps)
        """The public calls that made this graph, in order."""
        self.stands_for: dict[str, str] = {}
        """Tensors that took another's place since this graph was copied, by name, and the name of what was there."""

    @property
    def kind(self) -> str:
        """`serving` once its attention is paged, `plain` before."""
        return "serving" if any(n.op == "PagedAttention" for n in self.surgeon.nodes) else "plain"

    def kv_layers(self) -> list[KVLayer]:
        """One entry per PagedAttention node, in execution order."""
        return [KVLayer.of(n) for n in self.surgeon.nodes if n.op == "PagedAttention"]

    @property
    def activations(self) -> str:
        """The type that a serving graph's attention computes in: float32, float16 or bfloat16."""
        return next(np.dtype(n.outputs[0].dtype).name for n in self.surgeon.nodes if n.op == "PagedAttention")

    @property
    def recipe(self) -> dict[str, Any]:
        """What `llmlab.quantize` was told, as plain data; empty for a graph that isn't quantized."""
        told = [report.recipe for report in self.history if isinstance(report, QuantizationReport)]
        return {key: value for recipe in told for key, value in recipe.items()}

    def copy(self) -> Graph:
        """A graph that can be rewritten without touching this one; weights are shared."""
        surgeon = self.surgeon.copy()
        surgeon.functions = [function.copy() for function in self.surgeon.functions]
        return Graph(surgeon, self.config, self.assets, self.history, self.steps)

    def nodes(self, module: str = "") -> NodeTable:
        """The nodes that `module` and what lies in it made, such as `model.layers.0`; without one, all of them."""
        prefix = f"{module}." if module else ""
        return NodeTable(n for n in self.surgeon.nodes if f"{n.name.partition('/')[0]}.".startswith(prefix))

    def op_counts(self) -> dict[str, int]:
        """Nodes by operator, most frequent first."""
        return dict(Counter(n.op for n in self.surgeon.nodes).most_common())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all constants, each counted once."""
        return sum(int(t._values.nbytes) for t in constants(self.surgeon))

    def diff(self, other: Graph) -> GraphDiff:
        """What is different in `other`, seen from this graph. The same as `llmlab.diff(self, other)`."""
        return diff(self, other)

    def why(self, place: str) -> Why:
        """What each pass did at `place`, and what kept the others from it: from the history, so also once loaded.

        place: a part of a module's path, such as `layers.0.self_attn` (and all that lies in it) or `mlp` (of every
        layer), or the end of a node's name, such as `self_attn/PagedAttention`.
        Raises InputError, with the nearest names, if nothing of that name is or ever was in the graph.
        """
        return why(self, place)

    def to_onnx(self) -> onnx.ModelProto:
        """The model as one protobuf with its weights inside; for graphs under 2 GB. `save` takes any size."""
        return gs.export_onnx(self.surgeon, do_type_check=False, ir_version=11)

    def save(self, path: str | Path, *, overwrite: bool = False, copy_weights: bool = True) -> Path:
        """Write the graph as a folder (graph.onnx, weights.bin, graph.json, tokenizer files), whole or not at all.

        copy_weights: False leaves what is still as the checkpoint has it in the checkpoint's files, and notes their paths,
        sizes and times: a 7B model is then a few MB, which needs the checkpoint to be opened (`load(weights_from=…)`).
        """
        references = None if copy_weights else References(leave_out=Path(path))
        with atomic_folder(Path(path), overwrite=overwrite, marker=MANIFEST) as work:
            write_onnx(self.surgeon, work, references=references)
            for name, data in self.assets.items():
                (work / name).write_bytes(data)
            history = [report.to_dict() for report in self.history]
            manifest = {"format": FORMAT, "config": self.config.to_dict(), "history": history}
            manifest["steps"] = [step.to_dict() for step in self.steps]
            if references is not None:
                manifest["references"] = references.to_list()
            write_json(work / MANIFEST, manifest)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, *, weights_from: str | Path | None = None) -> Graph:
        """Open what `save` wrote. Weights are memory maps. Raises GraphError where the folder is damaged or holds links.

        weights_from: the folder whose files may be read, for a graph that was saved with `copy_weights=False`; also raises
        GraphError where one of these files lies elsewhere or was changed.
        """
        folder = Path(path).expanduser()
        where = folder / MANIFEST
        refuse_links((where, folder / MODEL, *(folder / name for name in ASSETS)), GraphError)
        if not where.is_file():
            raise GraphError(
                f"{folder}: no {MANIFEST} there; expected a folder that Graph.save or `llmlab export` wrote"
            )
        manifest = read_json(where, GraphError)
        version = manifest.get("format") if isinstance(manifest, dict) else None
        if version != FORMAT or isinstance(version, bool):
            raise GraphError(f"{folder}: graph format {version!r}, this llmlab reads {FORMAT}: export it again")
        config = ModelConfig.from_hf(manifest.get("config", {}), where=str(where))
        try:
            history = [read_report(entry) for entry in manifest.get("history", ())]
            steps = [Step.from_dict(entry) for entry in manifest.get("steps", ())]  # folders from before 0.2 have none
        except (TypeError, KeyError, ValueError, AttributeError) as problem:
            raise GraphError(f"{where}: its history is malformed: altered, export it again") from problem
        assets = {n: read_bytes(folder / n, GraphError) for n in ASSETS if (folder / n).is_file()}
        allowed = None if weights_from is None else Path(weights_from)
        references = open_references(manifest.get("references", []), allowed, where)
        return cls(read_onnx(folder, references=references), config, assets, history, steps)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "model_type": self.config.model_type,
            "nodes": len(self.surgeon.nodes),
            "ops": self.op_counts(),
            "weight_bytes": self.weight_bytes,
            "inputs": {t.name: {"dtype": str(t.dtype), "shape": t.shape} for t in self.surgeon.inputs},
            "outputs": {t.name: {"dtype": str(t.dtype), "shape": t.shape} for t in self.surgeon.outputs},
            "history": [r.to_dict() for r in self.history],
        }

    def __repr__(self) -> str:
        ops = ", ".join(f"{n} {op}" for op, n in list(self.op_counts().items())[:5])
        return f"Graph({self.kind} {self.config.model_type}, {len(self.surgeon.nodes)} nodes: {ops}, …; {self.weight_bytes / 1e6:.1f} MB)"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        rows = "".join(f"<tr><td>{html.escape(op)}</td><td>{n}</td></tr>" for op, n in self.op_counts().items())
        ports = "".join(
            f"<tr><td>{html.escape(side)}</td><td>{html.escape(t.name)}</td><td>{html.escape(str(t.dtype))} {html.escape(str(t.shape))}</td></tr>"
            for side, tensors in (("in", self.surgeon.inputs), ("out", self.surgeon.outputs))
            for t in tensors
            if not t.name.startswith("kv_cache.")
        )
        page = (
            f"<div><b>{html.escape(self.kind)} graph</b> of a {html.escape(self.config.model_type)} model: {len(self.surgeon.nodes)} nodes, "
            f"{self.weight_bytes / 1e6:.1f} MB of weights, {len(self.kv_layers())} paged KV layers</div>"
            f"<div style='display:flex;gap:2em;align-items:flex-start'><table><tr><th>operator</th><th>nodes</th></tr>{rows}</table>"
            f"<table><tr><th></th><th>tensor</th><th>type</th></tr>{ports}</table></div>"
        )
        return {"text/plain": repr(self), "text/html": page}
