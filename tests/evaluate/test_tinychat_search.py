"""On tinychat: what a search finds lies below the line between the uniform recipes, also on chats that it never saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import Store

import llmlab as ll
from llmlab.evaluate.reference import Reference

pytestmark = pytest.mark.slow

CANDIDATES = ("int8", "int4_rtn")


def test_search_is_on_or_above_the_front_of_uniform_recipes(store: Store, tmp_path: Path) -> None:
    graph = store.serving("tinychat")
    options = {"samples": 33, "cache": tmp_path / "measured", "progress": False}
    first = ll.search(graph, CANDIDATES, max_bytes=1 << 40, **options)  # type: ignore[arg-type]
    ends = [(m.size_bytes, m.kl.value) for m in first.uniform.values()]
    (large, low), (small, high) = ends
    assert small < large and low < high
    fresh = {}
    with Reference(ll.build(graph, tmp_path / "wide"), seed=1, samples=99, answers=False, progress=False) as reference:

        def unseen(name: str, recipe: ll.Recipe | str) -> float:
            engine = ll.build(ll.quantize(graph, recipe), tmp_path / name)
            kl = ll.evaluate(engine, reference=reference, seed=1, costs=False, progress=False).accuracy.kl
            assert kl is not None
            return kl.value

        for name in CANDIDATES:
            fresh[name] = unseen(name, name)
        for share in (0.25, 0.5, 0.75):
            budget = int(small + share * (large - small))
            found = ll.search(graph, CANDIDATES, max_bytes=budget, **options)  # type: ignore[arg-type]
            assert found.measured.size_bytes <= budget
            line = np.interp(found.measured.size_bytes, [small, large], [high, low])
            assert found.measured.kl.value <= line, "as good as a mix at random would be, at least"
            line = np.interp(found.measured.size_bytes, [small, large], [fresh["int4_rtn"], fresh["int8"]])
            assert unseen(f"found {share}", found.recipe) <= line
