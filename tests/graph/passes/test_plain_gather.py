from __future__ import annotations

import pytest
from small_graphs import apply, ops, refused, rows, same, small_graph

from llmlab.graph.passes.plain_gather import PlainGather


def picked(back: str = "1,2,0,3", indices: str = "value=int64[2,1] {-2, 0}"):
    return small_graph(
        "m (float[B,S,6,4] x) => (float y) {"
        f"i = Constant<{indices}>() t = Transpose<perm=[2,0,1,3]>(x) g = GatherND(t, i) y = Transpose<perm=[{back}]>(g) }}"
    )


def test_three_nodes_become_one() -> None:
    before = picked()
    after, report = apply(PlainGather, before)
    assert report.rewrites == 1 and ops(after) == {"Gather": 1}
    same(before, after, {"x": rows(2, 3, 6, 4)})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"back": "2,1,0,3"}, "the transposes around it don't undo each other"),
        (
            {"indices": "value=int64[1,2] {0, 0}", "back": "1,0,2"},
            "it gathers by indices of shape [1, 2], not a list along one axis",
        ),
    ],
)
def test_other_gathers_stay(given: dict[str, str], reason: str) -> None:
    assert refused(PlainGather, picked(**given)) == reason
