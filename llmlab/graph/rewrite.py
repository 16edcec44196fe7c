"""What a pass is: `pattern` finds a place, `check` says why it does not apply there, `rewrite` does the surgery."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace

import onnx_graphsurgeon as gs

from llmlab.graph.diff import diff, snapshot
from llmlab.graph.edit import Editor
from llmlab.graph.graph import Graph
from llmlab.graph.report import NearMiss, PassReport


class Match(SimpleNamespace):
    """A place that a pattern found: `node`, the anchor that a report names, and whatever the pattern captured."""

    node: gs.Node


class Pass:
    """One rewrite. Subclasses give `name`, a one-line docstring, and `pattern`, `check`, `rewrite`.

    A pass over the whole graph at once overrides `find` instead of `pattern`.
    """

    name: str

    def find(self, edit: Editor) -> Iterator[Match]:
        """Every place the pattern is found. Nodes that an earlier rewrite of this pass cut off are skipped."""
        for node in list(edit.surgeon.nodes):
            if node.outputs and (match := self.pattern(node)) is not None:
                yield match

    def pattern(self, node: gs.Node) -> Match | None:
        """The match anchored at `node`, or None where the pattern is not there."""
        raise NotImplementedError(f"{type(self).__name__} gives neither pattern nor find")

    def check(self, edit: Editor, match: Match) -> str | None:
        """None where the rewrite applies, else the reason why not, for people to read."""
        return None

    def rewrite(self, edit: Editor, match: Match) -> None:
        """Do the surgery. Nodes that nothing reads any more are removed afterwards."""
        raise NotImplementedError(f"{type(self).__name__} gives no rewrite")


def run_pass(rule: Pass, graph: Graph) -> PassReport:
    """Run one pass over `graph`, in place, and append its report to the graph's history."""
    start = time.perf_counter()
    before = snapshot(graph.surgeon)
    edit = Editor(graph)
    matches = rewrites = 0
    misses: list[NearMiss] = []
    for match in rule.find(edit):
        matches += 1
        reason = rule.check(edit, match)
        if reason is None:
            rule.rewrite(edit, match)
            rewrites += 1
        else:
            misses.append(NearMiss(match.node.name, reason))
    if rewrites:
        graph.surgeon.cleanup().toposort()
    after = snapshot(graph.surgeon)
    report = PassReport(
        name=rule.name,
        summary=(type(rule).__doc__ or "").strip().partition("\n")[0],
        matches=matches,
        rewrites=rewrites,
        near_misses=tuple(misses),
        nodes_before=len(before),
        nodes_after=len(after),
        seconds=round(time.perf_counter() - start, 4),
        diff=diff(before, after),
    )
    graph.history.append(report)
    return report
