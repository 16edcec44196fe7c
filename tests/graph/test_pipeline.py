"""Passes of users: where they run, how they go again, and what is said when one of them fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Any

import onnx_graphsurgeon as gs
import pytest
from conftest import Store
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graphs import attention_graph, padded_tokens, run

import llmlab as ll
from llmlab.errors import InputError, PassError, UnsupportedModelError
from llmlab.graph.optimize import PASSES
from llmlab.graph.pipeline import Pipeline


class Watch(ll.Pass):
    """Finds every product and leaves it alone."""

    name = "watch"

    def pattern(self, node: gs.Node) -> ll.Match | None:
        return ll.Match(node=node) if node.op == "MatMul" else None

    def check(self, edit: ll.Editor, match: ll.Match) -> str | None:
        return "it only watches"


def named(name: str) -> type[ll.Pass]:
    return type("Named", (Watch,), {"name": name})


def pipeline() -> Pipeline:
    """Four passes, `b` twice."""
    return Pipeline([named(n) for n in "abcbd"])


def order(given: Pipeline) -> str:
    return "".join(make().name for make in given.passes())


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((), (), "abcbdX"),
        ("a", (), "Xabcbd"),
        ("b", (), "aXbcbd"),
        ((), "b", "abcbXd"),
        ((), "a", "aXbcbd"),
        ("d", "b", "abcbXd"),
        (("d", "c"), ("a",), "aXbcbd"),
        ((), ["a", "c"], "abcXbd"),
    ],
)
def test_before_the_first_run_and_after_the_last(before: Any, after: Any, expected: str) -> None:
    passes = pipeline()
    passes.register_pass(before=before, after=after)(named("X"))
    assert order(passes) == expected
    passes.unregister_pass("X")
    assert order(passes) == "abcbd"


def test_registered_passes_are_ordered_by_each_other() -> None:
    passes = pipeline()
    passes.register_pass(after="a")(named("X"))
    passes.register_pass(after="a")(named("Y"))
    passes.register_pass(before="X", after="Y")(named("Z"))
    assert order(passes) == "aYZXbcbd"
    passes.register_pass(named("E"))  # would be last
    assert order(passes) == "aYZXbcbdE"
    passes.register_pass(before="a", after="E")(named("F"))
    assert order(passes) == "EFaYZXbcbd", "E moves to the front, so that F can"


@pytest.mark.parametrize(
    ("name", "before", "after", "reason"),
    [
        ("X", (), "fuse", "'X' is ordered by 'fuse', which is no other pass (known: Y, a, b, c, d)"),
        ("X", (), "X", "'X' is ordered by 'X', which is no other pass"),
        ("X", "a", "d", "'X' can't run both after 'd' and before 'a': the order is a, b, c, d"),
        ("X", "b", "b", "'X' can't run both after 'b' and before 'b'"),
        ("a", (), (), "llmlab has a pass called 'a' of its own"),
        ("two words", (), (), "Named.name is 'two words', expected a name"),
        ("", (), (), "Named.name is '', expected a name"),
        (None, (), (), "Named.name is None, expected a name"),
        ("X", 3, (), "expected the name of a pass or a list of them, got 3"),
        ("X", (), [3], "expected the name of a pass or a list of them, got [3]"),
        ("Y", (), (), "a pass called 'Y' is registered: register with replace=True"),
        ("X", "Y", "d", "'X' can't run both after 'd' and before 'b'"),
    ],
)
def test_what_is_refused_changes_nothing(name: Any, before: Any, after: Any, reason: str) -> None:
    passes = pipeline()
    passes.register_pass(before="b")(named("Y"))
    with pytest.raises(InputError) as caught:
        passes.register_pass(before=before, after=after)(named(name))
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert order(passes) == "aYbcbd"


@pytest.mark.parametrize("given", [3, Watch(), dict])
def test_only_passes_are_registered(given: Any) -> None:
    with pytest.raises(InputError, match=r"expected a class that derives from llmlab\.Pass"):
        pipeline().register_pass(given)


def test_replacing_keeps_what_is_ordered_by_it() -> None:
    passes = pipeline()
    passes.register_pass(after="a")(named("X"))
    passes.register_pass(after="X")(named("Y"))
    passes.register_pass(before="d", replace=True, after="c")(named("X"))
    assert order(passes) == "abcXYbd"
    with pytest.raises(InputError, match="wait for each other can't be ordered: X after Y after X"):
        passes.register_pass(after="Y", replace=True)(named("X"))
    with pytest.raises(InputError, match="Y is ordered before or after 'X': unregister it first"):
        passes.unregister_pass("X")
    with pytest.raises(InputError, match=r"no registered pass is called 'Z' \(known: X, Y\)"):
        passes.unregister_pass("Z")
    with pytest.raises(InputError, match=r"no registered pass is called 'a' \(llmlab's own a stays\)"):
        passes.unregister_pass("a")


names = st.lists(st.sampled_from("abcdXYZ"), max_size=2)


@settings(max_examples=300, deadline=None)
@given(wanted=st.lists(st.tuples(names, names), min_size=3, max_size=3))
def test_an_order_is_found_whenever_there_is_one(wanted: list[tuple[list[str], list[str]]]) -> None:
    """The oracle is a topological sort of every single run."""
    own = "abcbd"
    passes = pipeline()
    for name in "XYZ":
        passes.register_pass(named(name))
    accepted: dict[str, tuple[list[str], list[str]]] = {name: ([], []) for name in "XYZ"}
    for name, (before, after) in zip("XYZ", wanted, strict=True):
        if name in before + after:
            continue
        trial = accepted | {name: (before, after)}
        sorter: TopologicalSorter[Any] = TopologicalSorter({i: [i - 1] if i else [] for i in range(len(own))})
        runs = {c: [i for i, o in enumerate(own) if o == c] or [c] for c in "abcdXYZ"}
        for x, (b, a) in trial.items():
            for other in b:
                for at in runs[other]:
                    sorter.add(at, x)
            for other in a:
                sorter.add(x, *runs[other])
        try:
            sorter.prepare()
        except CycleError:
            with pytest.raises(InputError):
                passes.register_pass(before=before, after=after, replace=True)(named(name))
        else:
            passes.register_pass(before=before, after=after, replace=True)(named(name))
            accepted = trial
    found = order(passes)
    assert [c for c in found if c in own] == list(own) and sorted(found) == sorted(own + "XYZ")
    for x, (b, a) in accepted.items():
        assert all(found.index(x) < found.index(other) for other in b)
        assert all(found.index(x) > found.rindex(other) for other in a)


# In optimize


def test_optimize_runs_what_is_registered(store: Store) -> None:
    plain, own = store.plain("llama"), [make().name for make in PASSES]
    with ll.registered_pass(Watch, after="remove_no_ops", before="merge_products"):
        history = ll.optimize(plain).history
        names = [r.name for r in history]
        at = names.index("watch")
        assert [n for n in names if n != "watch"] == own
        assert "remove_no_ops" not in names[at:] and "merge_products" not in names[:at]
        assert history[at].near_misses[0].reason == "it only watches" and history[at].summary == Watch.__doc__
        assert all(r.name != "watch" for r in ll.optimize(plain, passes=PASSES[:2]).history)
    assert [r.name for r in ll.optimize(plain).history] == own


def test_passes_are_left_out_and_the_result_is_still_checked(store: Store) -> None:
    plain, own = store.plain("llama"), [make().name for make in PASSES]
    left = ll.optimize(plain, without=["merge_products", "remove_no_ops"])
    assert [r.name for r in left.history] == [n for n in own if n not in ("merge_products", "remove_no_ops")]
    assert left.kind == "serving" and "Split" not in left.op_counts()
    with pytest.raises(UnsupportedModelError, match=r"self_attn/Attention can't be paged"):
        ll.optimize(plain, without="page_attention")
    with pytest.raises(InputError, match=r"no pass is called 'merge' \(nearest: merge_"):
        ll.optimize(plain, without="merge")
    with pytest.raises(InputError, match="expected the name of a pass or a list of them, got 3"):
        ll.optimize(plain, without=3)  # type: ignore[arg-type]
    with ll.registered_pass(Watch):
        assert "watch" not in [r.name for r in ll.optimize(plain, without="watch").history]


def test_the_block_ends_with_the_pass_taken_out_also_after_an_error(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), ll.registered_pass(Watch):
        raise ZeroDivisionError
    with pytest.raises(InputError, match="no registered pass is called 'watch'"):
        ll.unregister_pass("watch")


def test_the_decorator_gives_the_class_back() -> None:
    try:
        assert ll.register_pass(Watch) is Watch
        assert ll.register_pass(after="fold_constants", replace=True)(Watch) is Watch
    finally:
        ll.unregister_pass("watch")


class MixesTokens(ll.Pass):
    """Every product's rows in another order: tokens of one sequence go to another."""

    name = "mixes_tokens"

    def pattern(self, node: gs.Node) -> ll.Match | None:
        return ll.Match(node=node) if node.op == "MatMul" else None

    def rewrite(self, edit: ll.Editor, match: ll.Match) -> None:
        x = match.node.inputs[0]
        match.node.inputs[0] = edit.add("CumSum", "m", [x, edit.constant("axis", [0])], dtype=x.dtype, shape=x.shape)


def test_a_wrong_pass_is_found_out(store: Store) -> None:
    """What users add is held to the contract of the serving graph like the rest."""
    with (
        ll.registered_pass(MixesTokens, after="merge_products"),
        pytest.raises(UnsupportedModelError, match=r"CumSum.* may mix tokens"),
    ):
        ll.optimize(store.plain("llama"))


# Passes that fail


ZERO = ZeroDivisionError("a\nb")


def broken(part: str, result: Any = ZERO) -> type[ll.Pass]:
    """A pass whose `part` raises or gives `result`; before that it rewires something."""

    def act(self: ll.Pass, *given: Any) -> Any:
        if part in ("check", "rewrite"):
            given[1].node.inputs[1] = given[1].node.inputs[0]
        if isinstance(result, BaseException):
            raise result
        return result

    return type("Broken", (Watch,), {"name": "broken", "check": lambda *_: None, part: act})


def some(edit: Any) -> Iterator[Any]:
    yield 3


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (broken("pattern"), r"'broken' failed in pattern at m\.x/Gather \(Gather\): ZeroDivisionError: a b"),
        (broken("check"), r"'broken' failed in check at m\.q0/MatMul \(MatMul\): ZeroDivisionError: a b"),
        (broken("rewrite"), r"'broken' failed in rewrite at m\.q0/MatMul \(MatMul\): ZeroDivisionError: a b"),
        (broken("find"), r"'broken' failed in find: ZeroDivisionError: a b"),
        (broken("find", 3), r"'broken' failed in find: TypeError: 'int' object is not iterable"),
        (broken("find", [3]), r"'broken' failed in find: TypeError: found 3, expected a Match"),
        (
            broken("pattern", ll.Match(at=1)),
            r"'broken' failed in find: TypeError: found Match\(at=1\), expected a Match",
        ),
        (broken("check", False), r"'broken' failed in check at m\.q0/MatMul .* check gave False, expected None or"),
        (broken("check", ""), r"check gave '', expected None or the reason as text"),
    ],
)
def test_a_pass_that_fails_is_one_line_and_the_graph_as_it_was(made: type[ll.Pass], said: str) -> None:
    graph = attention_graph()
    text, result = graph.to_onnx().SerializeToString(), run(graph, padded_tokens())
    with ll.registered_pass(made, after="fold_constants"), pytest.raises(PassError, match=said) as caught:
        ll.optimize(graph)
    assert "\n" not in str(caught.value)
    assert graph.to_onnx().SerializeToString() == text and not graph.history
    assert all((a == b).all() for a, b in zip(result, run(graph, padded_tokens()), strict=True))


def test_a_cycle_that_a_pass_makes_is_its_fault() -> None:
    def rewrite(self: ll.Pass, edit: ll.Editor, match: ll.Match) -> None:
        match.node.inputs[0] = match.node.outputs[0]

    made = type("Loop", (Watch,), {"name": "loop", "check": lambda *_: None, "rewrite": rewrite})
    with pytest.raises(PassError, match=r"'loop' failed in rewrite: .*[Cc]ycle"):
        ll.optimize(attention_graph(), passes=[made])


def test_an_llmlab_error_keeps_its_words() -> None:
    with pytest.raises(InputError, match=r"^mine$"):
        ll.optimize(attention_graph(), passes=[broken("check", InputError("mine"))])


def test_ctrl_c_is_not_the_fault_of_a_pass() -> None:
    with pytest.raises(KeyboardInterrupt):
        ll.optimize(attention_graph(), passes=[broken("check", KeyboardInterrupt())])


def test_registering_needs_no_torch() -> None:
    code = "import sys, llmlab as ll; ll.register_pass, ll.Pass, ll.Match, ll.Editor; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
