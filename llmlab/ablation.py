"""What each pass is good for: the model with all passes against the model with one of them left out, measured in turn."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from llmlab.build import build
from llmlab.errors import LlmlabError
from llmlab.graph.graph import Graph
from llmlab.graph.optimize import optimize
from llmlab.runtime.batch import StepBatch
from llmlab.runtime.manifest import MODEL, WEIGHTS

if TYPE_CHECKING:
    from rich.console import RenderableType

PROMPT = 128  # tokens of the prefill, and of what a decode step attends to; fewer where the model holds fewer
SEQUENCES = 8
TOLERANCE = 1e-3
"""Largest difference of logits, relative to the largest logit, that rounding explains."""
_STEPS = 3  # timed in a turn, after one that isn't


@dataclass(frozen=True)
class Cost:
    """What a step costs without the pass, over what it costs with it: quartiles of the ratios of all rounds."""

    ms: float
    """Median of a step without the pass."""
    low: float
    ratio: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether the middle half of the rounds agrees on who is faster."""
        return self.low > 1 or self.high < 1

    def __str__(self) -> str:
        return f"{self.ratio - 1:+.1%}" if self.certain else f"≈ 0 ({self.ratio - 1:+.1%})"


@dataclass(frozen=True)
class Ablated:
    """The model without one pass (or with all of them, in the first row, whose name is empty)."""

    name: str
    verdict: str
    """`all passes`, `required`, `idle` (it rewrote nothing in this model), `measured`, or `wrong`."""
    reason: str = ""
    """Which check refused the model, or what is wrong: the model was accepted, and fails or says something else."""
    nodes: int = 0
    """Of the serving graph."""
    engine_nodes: int = 0
    """Of what ONNX Runtime is given."""
    operators: int = 0
    """Different ones in the serving graph."""
    weight_bytes: int = 0
    """Of the engine."""
    steps: dict[str, Cost] = field(default_factory=dict)
    """By task: `decode B=1`, `decode B=8`, `prefill 128`. Of the first row the times alone mean something."""

    def earns(self, everything: Ablated) -> bool:
        """Whether something is lost without the pass: the model, speed in some step, nodes, or bytes."""
        if self.verdict != "measured":
            return self.verdict in ("required", "wrong")
        fewer = everything.nodes < self.nodes or everything.engine_nodes < self.engine_nodes
        smaller = everything.weight_bytes < self.weight_bytes
        return fewer or smaller or any(cost.low > 1 for cost in self.steps.values())


@dataclass(frozen=True)
class Ablation:
    """All rows for one model: with all passes first, then without each."""

    model: str
    rows: tuple[Ablated, ...]

    def to_dict(self) -> dict[str, Any]:
        first = self.rows[0]
        return {
            "kind": "passes",
            "model": self.model,
            "rows": [asdict(row) | {"earns": row.earns(first)} for row in self.rows],
        }

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        first, *others = self.rows
        table = Table(title=f"{self.model}: without each pass, against all passes")
        for name in ("left out", "nodes (engine)", "operators", "weights", *first.steps):
            table.add_column(name, justify="left" if name == "left out" else "right")
        size = f"{first.weight_bytes / 1e6:.1f} MB"
        times = [f"{cost.ms:.2f} ms" for cost in first.steps.values()]
        table.add_row("nothing", f"{first.nodes} ({first.engine_nodes})", str(first.operators), size, *times)
        table.add_section()
        for row in others:
            if row.verdict != "measured":
                table.add_row(f"{row.name}: {row.verdict}")
                continue
            nodes = f"{row.nodes - first.nodes:+d} ({row.engine_nodes - first.engine_nodes:+d})"
            grown = f"{(row.weight_bytes - first.weight_bytes) / 1e6:+.1f} MB"
            name = row.name if row.earns(first) else f"{row.name}: earns nothing"
            table.add_row(name, nodes, f"{row.operators - first.operators:+d}", grown, *map(str, row.steps.values()))
        notes = [Text(f"{row.name}: {row.verdict}: {row.reason}", overflow="fold") for row in others if row.reason]
        return Group(table, *notes)


class _Variant:
    """One engine that is open: the serving graph it was made of, and the steps that are timed."""

    def __init__(self, graph: Graph, folder: Path, threads: int | None, stack: ExitStack) -> None:
        longest = min(graph.config.max_position_embeddings, 2 * PROMPT)
        self.prompt = min(PROMPT, longest - 1)
        engine = build(graph, folder, max_seq_len=longest, max_tokens_per_step=PROMPT)
        self.facts: dict[str, Any] = {
            "nodes": len(graph.surgeon.nodes),
            "operators": len(graph.op_counts()),
            "engine_nodes": len(onnx.load(folder / MODEL, load_external_data=False).graph.node),
            "weight_bytes": int(engine.manifest.files[WEIGHTS]["size"]),
        }
        self._backend = stack.enter_context(closing(engine.backend(threads=threads, max_num_seqs=SEQUENCES)))
        tokens = np.random.default_rng(0).integers(0, self._backend.limits.vocab_size, (SEQUENCES, self.prompt + 1))
        for slot, row in enumerate(tokens):  # what the decode steps attend to
            self._backend.execute(_step(row[None, :-1], 0, [slot]))
        self.steps = {
            "decode B=1": _step(tokens[:1, -1:], self.prompt, [0]),
            f"decode B={SEQUENCES}": _step(tokens[:, -1:], self.prompt, list(range(SEQUENCES))),
            f"prefill {self.prompt}": _step(tokens[:1, :-1], 0, [0]),
        }

    def logits(self) -> NDArray[np.float32]:
        return np.concatenate([self._backend.execute(step).copy() for step in self.steps.values()])

    def seconds(self, task: str) -> float:
        """Median of a turn of steps, after one that warms up."""
        times = []
        for _ in range(_STEPS + 1):
            began = time.perf_counter()
            self._backend.execute(self.steps[task])
            times.append(time.perf_counter() - began)
        return float(np.median(times[1:]))


def measure(graph: Graph, *, threads: int | None = None, rounds: int = 15) -> Iterator[tuple[Ablated, int]]:
    """One row after another, each with the number of rows that there will be; the first is that of all passes.

    graph: a plain graph. threads: of ONNX Runtime (default: physical cores). rounds: how often the model with all
    passes and the one without a pass take turns; who is first alternates.
    Raises what `optimize` and `build` raise for the graph itself.
    """
    with tempfile.TemporaryDirectory(prefix="llmlab-passes-") as folder, ExitStack() as stack:
        serving = optimize(graph)
        everything = _Variant(serving, Path(folder) / "all", threads, stack)
        logits = everything.logits()
        done = {name: sum(r.rewrites for r in serving.history if r.name == name) for name in _names(serving)}
        total = len(done) + 1
        alone = {task: [everything.seconds(task) for _ in range(rounds)] for task in everything.steps}
        steps = {task: Cost(float(np.median(times)) * 1e3, 1.0, 1.0, 1.0) for task, times in alone.items()}
        yield Ablated("", "all passes", steps=steps, **everything.facts), total
        for name, rewrites in done.items():
            if not rewrites:
                yield Ablated(name, "idle"), total
                continue
            with ExitStack() as one, tempfile.TemporaryDirectory(dir=folder) as place:
                try:
                    without = optimize(graph, without=name)
                    variant = _Variant(without, Path(place) / "engine", threads, one)
                    error = float(np.abs(variant.logits() - logits).max() / np.abs(logits).max())
                except LlmlabError as refusal:
                    yield Ablated(name, "required", str(refusal)), total
                    continue
                except RuntimeError as problem:  # of ONNX Runtime: the model was accepted and can't run
                    yield Ablated(name, "wrong", " ".join(str(problem).split())), total
                    continue
                if not error < TOLERANCE:
                    yield Ablated(name, "wrong", f"logits are off by {error:.1e}", **variant.facts), total
                    continue
                costs = {task: _cost(everything, variant, task, rounds) for task in everything.steps}
                yield Ablated(name, "measured", steps=costs, **variant.facts), total


def _names(graph: Graph) -> list[str]:
    return list(dict.fromkeys(report.name for report in graph.history))


def _cost(everything: _Variant, without: _Variant, task: str, rounds: int) -> Cost:
    ratios, times = [], []
    for turn in range(rounds):
        if turn % 2:
            after, before = without.seconds(task), everything.seconds(task)
        else:
            before, after = everything.seconds(task), without.seconds(task)
        ratios.append(after / before)
        times.append(after)
    low, ratio, high = (float(q) for q in np.percentile(ratios, (25, 50, 75)))
    return Cost(float(np.median(times)) * 1e3, low, ratio, high)


def _step(tokens: NDArray[np.int64], past: int, slots: list[int]) -> StepBatch:
    """New `tokens` [B, n] behind `past` tokens of each sequence, in `slots`; the logits of each one's last token."""
    batch, new = tokens.shape
    ends = np.arange(batch + 1, dtype=np.int32) * new
    return StepBatch(
        input_ids=np.ascontiguousarray(tokens.reshape(-1), np.int64),
        position_ids=np.tile(np.arange(past, past + new, dtype=np.int64), batch),
        query_start=ends,
        kv_len=np.full(batch, past + new, np.int32),
        block_table=np.array(slots, np.int32)[:, None],
        logits_index=ends[1:].astype(np.int64) - 1,
    )
