"""What can be quantized in a serving graph, and how it is called."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import Store

from llmlab.errors import InputError
from llmlab.quant.projections import matches, projections, select

LAYER = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.mark.parametrize("name", ["llama", "llama3"])
def test_the_projections_of_a_llama(store: Store, name: str) -> None:
    """Merged or not, tied or not: the module's names, in the order of the graph, with the checkpoint's numbers."""
    from safetensors.numpy import load_file

    found = projections(store.serving(name))
    assert [p.role for p in found] == ["embedding", *LAYER, *LAYER, "head"]
    assert [p.layer for p in found] == [None, *[0] * 7, *[1] * 7, None]
    weights = load_file(store.checkpoint(name) / "model.safetensors")
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if name == "llama3" else {}
    for p in found:
        expected = weights[tied.get(f"{p.name}.weight", f"{p.name}.weight")]
        assert p.shape == expected.shape and p.transposed and not p.is_quantized
        np.testing.assert_array_equal(p.load(), expected)
    merged = [p for p in found if p.layer == 0 and p.role in ("q", "k", "v")]
    assert len({id(p.node) for p in merged}) == 1 == len({id(p.input) for p in merged})
    assert [p.reader.inputs[p.index] is p.weight for p in found] == [True] * len(found)


def test_choosing_by_pattern(store: Store) -> None:
    found = projections(store.serving("llama"))
    names = [p.name for p in select(found, "*.down_proj")]
    assert names == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert [p.name for p in select(found, "down")] == names, "a role"
    assert {p.layer for p in select(found, "model.layers.1.*")} == {1}
    assert [p.name for p in select(found, "head")] == ["lm_head"]
    assert not matches(found[1], "q_proj"), "a name is matched whole"


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("*.down_prj", r"\*\.down_proj"), ("dwon", "down"), ("model.layers.0.mlp.upproj", "model.layers.0.mlp.up_proj")],
)
def test_a_pattern_that_matches_nothing(store: Store, pattern: str, near: str) -> None:
    with pytest.raises(InputError, match=f"no projection matches .*; nearest: .*{near}"):
        select(projections(store.serving("llama")), pattern)


def test_only_serving_graphs_have_them(store: Store) -> None:
    with pytest.raises(InputError, match="expected a serving graph"):
        projections(store.plain("llama"))
