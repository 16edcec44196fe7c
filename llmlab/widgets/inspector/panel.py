"""The inspector: what its controls do, and what takes longer; `state.py` is what it shows, `draw_*.py` make HTML of that."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import onnx_graphsurgeon as gs
from markupsafe import Markup

from llmlab.errors import InputError, LlmlabError, nearest
from llmlab.graph.graph import Graph
from llmlab.widgets.inspector import draw_bar, draw_block, draw_details, draw_tree
from llmlab.widgets.inspector.errors import weight_errors
from llmlab.widgets.inspector.overlays import error_overlay, flops_overlay, time_overlay
from llmlab.widgets.inspector.search import Index
from llmlab.widgets.inspector.state import InspectorState
from llmlab.widgets.inspector.values import histogram, is_slow, sample, sample_quantized
from llmlab.widgets.panel import Panel


class Inspector(InspectorState, Panel):
    """A graph as a tree of layers, blocks and nodes, with a picture of what is unfolded, numbers on it, and search.

    times: seconds by name of a node. engine: the engine (or its folder) that was built of this graph, to be measured on a click.
    reference: the graph before it was quantized, for the error of each weight.
    """

    regions = ("bar", "hits", "legend", "tree", "picture", "details")
    name = "inspector"

    def __init__(
        self,
        graph: Graph,
        *,
        times: Mapping[str, float] | None = None,
        engine: Any = None,
        reference: Graph | None = None,
    ) -> None:
        Panel.__init__(self)
        InspectorState.__init__(self, graph, times=times, engine=engine, reference=reference)
        self._index: Index | None = None
        self._stop = threading.Event()
        self._worker: threading.Thread | None = None

    # Actions

    def on_open(self, key: str, value: Any) -> Iterable[str]:
        """A group in the tree: unfold or fold it; it is what the picture shows."""
        group = self.find_group(key)
        fold_key = group.fold.key if group.fold is not None else ""
        if fold_key in self.unfolded:
            self.unfolded.discard(fold_key)
            self.group = group
        else:
            self.reveal(group)
        self.pick(None)
        return ("tree", "picture", "details")

    def on_enter(self, key: str, value: Any) -> Iterable[str]:
        """A group in the picture, or in the path above it."""
        self.reveal(self.find_group(key))
        self.pick(None)
        return ("tree", "picture", "details")

    def on_member(self, key: str, value: Any) -> Iterable[str]:
        """Another one of several alike groups."""
        return self.on_enter(str(value), None)

    def on_pick(self, key: str, value: Any) -> Iterable[str]:
        """A node, wherever it is shown."""
        if key not in self.tree.leaves:
            raise InputError(f"{key!r} is no node of this graph ({nearest(key, self.tree.leaves)})")
        self.show(key)
        return ("tree", "picture", "details")

    on_box = on_go = on_pick

    def on_search(self, key: str, value: Any) -> Iterable[str]:
        self.query = str(value or "")
        if self._index is None:
            self._index = Index(self.leaves)
        self.hits, self.found = self._index.find(self.query)
        return ("hits",)

    def on_overlay(self, key: str, value: Any) -> Iterable[str] | None:
        if value not in self.overlays:
            raise InputError(f"no overlay {value!r}, expected one of: {', '.join(self.overlays)}")
        self.overlay = self.overlays[value]
        self.weigh()
        if value == "error" and self.reference is not None and not self.overlay.values:
            self._start(self._find_errors)
        return ("bar", "legend", "tree", "picture", "details")

    def on_context(self, key: str, value: Any) -> Iterable[str]:
        """The context length, as a power of two."""
        self.context = 2 ** max(0, min(int(value), 20))
        self.overlays["flops"] = flops_overlay(self.leaves, self.context)
        self.overlay = self.overlays[self.overlay.name]
        self.weigh()
        return ("legend", "tree", "picture", "details")

    def on_look(self, key: str, value: Any) -> Iterable[str]:
        """What is in the constant that is input `key` of the node."""
        leaf, index = self.leaf, int(key) if key.isdecimal() else -1
        tensor = leaf.node.inputs[index] if leaf is not None and 0 <= index < len(leaf.node.inputs) else None
        if not isinstance(tensor, gs.Constant):
            raise InputError(f"input {key!r} holds no weight: choose one that has a histogram")
        self.looked_at, self.histograms = index, []
        if is_slow(tensor):
            self._start(self._look)
        else:
            self._look()
        return ("details",)

    def on_measure(self, key: str, value: Any) -> Iterable[str]:
        """Time the layers of the engine."""
        if self.engine is None:
            raise InputError("no engine to measure: inspect(graph, engine=…) with one that was built of this graph")
        self.working = "measuring"
        self._start(self._measure)
        return ("bar", "legend")

    def on_stop(self, key: str, value: Any) -> Iterable[str]:
        self._stop.set()
        return ("legend",)

    # What takes longer

    def _start(self, work: Any) -> None:
        """Run `work` on a thread of its own; one at a time, the one before is stopped."""
        self._stop.set()
        self._stop = threading.Event()
        self._worker = threading.Thread(target=work, daemon=True)
        self._worker.start()

    def close(self) -> None:
        self._stop.set()

    def wait(self, timeout: float | None = None) -> None:
        """Until what runs in the background has ended."""
        if self._worker is not None:
            self._worker.join(timeout)

    def _look(self) -> None:
        with self.lock:
            leaf, index = self.leaf, self.looked_at
        if leaf is None or index is None:
            return
        found = draw_details.what_is_in(leaf, index)
        made = []
        for label, constant, weight in found:
            total = int(constant._values.size if hasattr(constant._values, "size") else 0) or _count(constant)
            numbers = sample_quantized(weight) if weight is not None else sample(constant)
            made.append((label, histogram(numbers, total)))
        with self.lock:
            if (self.leaf, self.looked_at) == (leaf, index):
                self.histograms = made
        if threading.current_thread() is self._worker:
            self.refresh("details")

    def _measure(self) -> None:
        from llmlab.evaluate.layers.measure import layers as measured

        stop, found, problem = self._stop, {}, ""
        try:
            layers = measured(self.engine, stop=stop)
            found = {phase: layers.by_node(phase) for phase in layers.phases}
        except LlmlabError as error:
            problem = str(error)
        except KeyboardInterrupt:  # Stop was pressed
            problem = "stopped"
        with self.lock:
            self.working = ""
            for phase, seconds in found.items():
                known = {name: time for name, time in seconds.items() if name in self.tree.leaves}
                self.overlays[f"time {phase}"] = time_overlay(known, phase)
            if found:
                self.overlays.pop("time", None)
                self.overlay = self.overlays[f"time {next(iter(found))}"]
                self.weigh()
            else:
                self.overlays["time"] = time_overlay({}, missing=problem or "nothing was measured")
                self.overlay = self.overlays["time"]
        self.refresh("bar", "legend", "tree", "picture", "details")

    def _find_errors(self) -> None:
        stop, found, last = self._stop, {}, 0.0
        assert self.reference is not None
        for done, total, name, pair in weight_errors(self.leaves, self.reference):
            if stop.is_set():
                break
            if pair is not None:
                found[name] = pair
            if time.monotonic() - last > 0.2:
                self._errors(found, f"{done} of {total} weights compared", "")
                last = time.monotonic()
        missing = "" if found else "no quantized weight has a counterpart of its name and shape in the reference"
        self._errors(found, "", missing)

    def _errors(self, found: Mapping[str, tuple[float, float]], working: str, missing: str) -> None:
        with self.lock:
            self.working = working
            self.overlays["error"] = error_overlay(dict(found), missing)
            if self.overlay.name == "error":
                self.overlay = self.overlays["error"]
                self.weigh()
        self.refresh("legend", "tree", "picture")

    # Drawing

    def draw_bar(self) -> Markup:
        return draw_bar.bar(self)

    def draw_hits(self) -> Markup:
        return draw_bar.hits(self)

    def draw_legend(self) -> Markup:
        return draw_bar.legend(self)

    def draw_tree(self) -> Markup:
        return draw_tree.static_tree(self) if self.is_static else draw_tree.tree(self)

    def draw_picture(self) -> Markup:
        group = self.group
        if self.is_static and group is self.tree.root:
            group = draw_tree.typical_layer(self)
        return draw_block.block(self, group)

    def draw_details(self) -> Markup:
        return draw_details.details(self)

    def to_dict(self) -> dict[str, Any]:
        """The layers and their blocks, alike ones as one, with the sum of each overlay."""
        shown = {"overlay": self.overlay.name, "context": self.context, "group": self.group.path}
        return {**super().to_dict(), **shown, "tree": self.sums()}


def _count(constant: gs.Constant) -> int:
    total = 1
    for size in constant.shape:
        total *= int(size)
    return total
