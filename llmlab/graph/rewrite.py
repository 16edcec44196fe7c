"""What a pass is: `pattern` finds a place, `check` says why it does not apply there, `rewrite` does the surgery."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import onnx_graphsurgeon as gs

from llmlab.errors import LlmlabError, PassError
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
            if node.outputs:
                with _named(self, "pattern", node):
                    match = self.pattern(node)
                if match is not None:
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
    """Run one pass over `graph`, in place, and append its report to the graph's history.

    Raises PassError where the pass raises something that isn't an LlmlabError; the graph may be half rewritten then.
    """
    start = time.perf_counter()
    before = snapshot(graph.surgeon)
    edit = Editor(graph)
    matches = rewrites = 0
    misses: list[NearMiss] = []
    for match in _found(rule, edit):
        matches += 1
        with _named(rule, "check", match.node):
            reason = rule.check(edit, match)
            if not (reason is None or (isinstance(reason, str) and reason)):
                raise TypeError(f"check gave {reason!r}, expected None or the reason as text")
        if reason is None:
            with _named(rule, "rewrite", match.node):
                rule.rewrite(edit, match)
            rewrites += 1
        else:
            misses.append(NearMiss(match.node.name, reason))
    if rewrites:
        with _named(rule, "rewrite", None):
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


def _found(rule: Pass, edit: Editor) -> Iterator[Match]:
    """What `rule.find` yields, one at a time, so that each is looked for in the graph as the one before left it."""
    with _named(rule, "find", None):
        places = iter(rule.find(edit))
    while True:
        with _named(rule, "find", None):
            match = next(places, None)
            if match is not None and not (isinstance(match, Match) and isinstance(vars(match).get("node"), gs.Node)):
                raise TypeError(f"found {match!r}, expected a Match(node=…)")
        if match is None:
            return
        yield match


@contextmanager
def _named(rule: Pass, part: str, node: gs.Node | None) -> Iterator[None]:
    """What a part of a pass raises becomes one line with the pass's name and the node."""
    try:
        yield
    except LlmlabError:
        raise
    except Exception as problem:
        said = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
        at = "" if node is None else f" at {node.name} ({node.op})"
        raise PassError(f"pass {rule.name!r} failed in {part}{at}: {said}") from problem
