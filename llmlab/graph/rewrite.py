"""What a pass is: `pattern` finds a place, `check` says why it does not apply there, `rewrite` does the surgery."""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import onnx_graphsurgeon as gs

from llmlab.errors import GraphError, LlmlabError, PassError
from llmlab.graph.edit import Editor, sort_nodes
from llmlab.graph.graph import Graph
from llmlab.graph.reports.diff import compare
from llmlab.graph.reports.report import NearMiss, PassReport, Rewrite
from llmlab.graph.reports.sketch import sketches
from llmlab.graph.reports.snapshot import Snapshot, snapshot


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


def run_pass(rule: Pass, graph: Graph, before: Snapshot | None = None) -> Snapshot:
    """Run one pass over `graph`, in place, and append its report to the graph's history.

    Gives back the graph as the pass left it, which the next one can take as `before`.
    Raises PassError where the pass raises something that isn't an LlmlabError; the graph may be half rewritten then.
    """
    start, bytes_before = time.perf_counter(), graph.weight_bytes
    before = snapshot(graph.surgeon) if before is None else before
    edit = Editor(graph)
    places: list[Rewrite] = []
    misses: list[NearMiss] = []
    for match in _found(rule, edit):
        name = match.node.name  # of the anchor, which may be gone afterwards
        with _named(rule, "check", match.node):
            reason = rule.check(edit, match)
            if not (reason is None or (isinstance(reason, str) and reason)):
                raise TypeError(f"check gave {reason!r}, expected None or the reason as text")
        if reason is None:
            count = len(edit.surgeon.nodes)
            with _named(rule, "rewrite", match.node):
                rule.rewrite(edit, match)
            places.append(Rewrite(name, tuple(n.name for n in edit.surgeon.nodes[count:])))
        else:
            misses.append(NearMiss(name, reason))
    after = before
    if places:
        try:
            sort_nodes(graph.surgeon.cleanup())
        except GraphError as problem:  # a cycle, which the graph didn't have before
            raise PassError(f"pass {rule.name!r} failed in rewrite: {problem}") from problem
        after = snapshot(graph.surgeon)
    changes = compare(before, after)
    rewritten = _with_removed(places, before, changes.removed)
    graph.history.append(
        PassReport(
            name=rule.name,
            summary=(type(rule).__doc__ or "").strip().partition("\n")[0],
            matches=len(places) + len(misses),
            rewrites=len(places),
            near_misses=tuple(misses),
            nodes_before=len(before.nodes),
            nodes_after=len(after.nodes),
            diff=changes,
            places=rewritten,
            sketches=sketches(rewritten, before, after) if rewritten else (),
            run=1 + sum(r.name == rule.name for r in graph.history),
            source=_source(type(rule)),
            weight_bytes_before=bytes_before,
            weight_bytes_after=graph.weight_bytes if places else bytes_before,
            seconds=round(time.perf_counter() - start, 4),
        )
    )
    return after


def _with_removed(places: list[Rewrite], before: Snapshot, removed: Collection[str]) -> tuple[Rewrite, ...]:
    """The places, each with those of the removed nodes that were nearer to its anchor than to any other."""
    beside: dict[str, list[str]] = {name: [] for name in before.nodes}
    for name, facts in before.nodes.items():
        for made in facts.inputs:
            maker = made if made in beside else made.rpartition(":")[0]
            if maker in beside:
                beside[name].append(maker)
                beside[maker].append(name)
    owner: dict[str, int] = {}
    for at, place in enumerate(places):
        if place.node in beside:
            owner.setdefault(place.node, at)
    for through in (removed, beside):  # by way of nodes that went as far as that leads, then by way of any
        pending = deque(owner)
        while pending:
            name = pending.popleft()
            for neighbour in beside[name]:
                if neighbour in through and neighbour not in owner:
                    owner[neighbour] = owner[name]
                    pending.append(neighbour)
    gone: dict[int, list[str]] = {}
    for name in removed:  # in the order of the graph
        if name in owner:
            gone.setdefault(owner[name], []).append(name)
    return tuple(replace(place, removed=tuple(gone.get(at, ()))) for at, place in enumerate(places))


_SOURCES: WeakKeyDictionary[type, str] = WeakKeyDictionary()


def _source(pass_class: type) -> str:
    """File and line of a class, without the folders that only this machine has; empty where there is no file. Looked up
    once a class, since Python parses the whole file for it."""
    if pass_class not in _SOURCES:
        module = pass_class.__module__
        try:
            line = inspect.findsource(pass_class)[1] + 1
            _SOURCES[pass_class] = f"{module if module == '__main__' else module.replace('.', '/') + '.py'}:{line}"
        except (OSError, TypeError):
            _SOURCES[pass_class] = ""
    return _SOURCES[pass_class]


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
