"""PagedAttention on ONNX Runtime against its definition in NumPy, over ragged steps, in all its forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import steps
from attention_forms import FORMS, LARGE, PLAN, VOCAB, form, reference, worst
from small_graphs import run

from llmlab.build import build
from llmlab.errors import UnsupportedModelError
from llmlab.graph.graph import Graph
from llmlab.graph.lower import onnxruntime_attention as lowering
from llmlab.graph.lower.onnxruntime import lower
from llmlab.runtime.batch import StepBatch

TOLERANCE = 2e-5


def engine(graph: Graph, folder: Path, spoil: Any = None) -> list[np.ndarray]:
    backend = build(graph, folder, max_tokens_per_step=32).backend(threads=1, max_num_seqs=8)
    for layer in backend._pool.layers:
        layer[:] = np.nan
    tables = steps.slot_tables(PLAN, [4, 1, 0, 6])
    batches = [b for b, _ in steps.batches(PLAN, VOCAB, tables, steps.all_rows)]
    found = [backend.execute(b if spoil is None else spoil(b)).copy() for b in batches]
    backend.close()
    return found


@pytest.mark.parametrize("options", (FORMS | LARGE).values(), ids=FORMS | LARGE)
def test_every_form_equals_the_reference(tmp_path: Path, options: dict[str, Any]) -> None:
    graph = form(options)
    assert worst(engine(graph, tmp_path / "e"), reference(graph)) < TOLERANCE


@pytest.mark.parametrize("taken", ["rotary", "interleaved", "window", "softcap", "sinks", "alibi"])
def test_every_part_matters(tmp_path: Path, taken: str) -> None:
    """Without it the result is another one: the comparison above would notice."""
    full: dict[str, Any] = {"rotary": 8, "interleaved": 1, "window": 3}
    full |= {"alibi": True} if taken == "alibi" else {"softcap": 2.0, "sinks": True}
    less = {name: value for name, value in full.items() if name != taken}
    assert worst(engine(form(less), tmp_path / "e"), reference(form(full))) > 1000 * TOLERANCE


@pytest.mark.parametrize("most", [1 << 25, 0], ids=["whole", "in tiles"])
@pytest.mark.parametrize("more", [{}, {"window": 3}, {"interleaved": 1}, {"sinks": True}], ids=str)
def test_scores_may_be_whole_or_in_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], most: int
) -> None:
    monkeypatch.setattr(lowering, "_MOST_SCORES", most)
    graph = form({"rotary": 16} | more)
    node = next(n for n in lower(graph, capacity=64, max_tokens=32).surgeon.nodes if n.op == "GroupQueryAttention")
    assert node.attrs["scale"] == (1.0 if most else 0.3)
    if not more.get("sinks"):
        sinks = node.inputs[11]
        assert np.isneginf(sinks.values).all() if most else not sinks.name
    assert worst(engine(graph, tmp_path / "e"), reference(graph)) < TOLERANCE


def test_half_of_the_scale_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that hold the scale for queries alone, or keys, give other results: the comparison above would notice."""
    plain = lowering.AttentionLowering._by_slot
    monkeypatch.setattr(lowering.AttentionLowering, "_by_slot", lambda self, t, f=1.0: plain(self, t, f**0.5))
    graph = form({"rotary": 16})
    assert worst(engine(graph, tmp_path / "e"), reference(graph)) > 1000 * TOLERANCE


@pytest.mark.parametrize(
    ("options", "scale"), [({"rotary": 16}, 1.0), ({"rotary": 8, "dim": 32}, 0.3), ({}, 0.3), ({"alibi": True}, 0.3)]
)
def test_the_scale_moves_where_all_channels_turn(options: dict[str, Any], scale: float) -> None:
    lowered = lower(form(options), capacity=64, max_tokens=32)
    assert next(n for n in lowered.surgeon.nodes if n.op == "GroupQueryAttention").attrs["scale"] == scale


def test_many_scores_stay_in_tiles() -> None:
    """4 heads · 4,096 tokens · 4,096 keys would take 256 MiB. Who reads keys in the slots asks for no such step."""
    scales = {}
    for tokens in (512, 4096, None):
        lowered = lower(form({"rotary": 16}), capacity=4096, max_tokens=tokens)
        scales[tokens] = next(n for n in lowered.surgeon.nodes if n.op == "GroupQueryAttention").attrs["scale"]
    assert scales == {512: 1.0, 4096: 0.3, None: 0.3}


def shifted(batch: StepBatch) -> StepBatch:
    """Decoded tokens say that they are one place earlier than they are."""
    decoded = np.repeat(np.diff(batch.query_start) == 1, np.diff(batch.query_start)) & (batch.position_ids > 0)
    return replace(batch, position_ids=batch.position_ids - decoded)


@pytest.mark.parametrize("name", ["small partial", "alibi"])
def test_a_wrong_position_is_seen(tmp_path: Path, name: str) -> None:
    graph = form(FORMS[name])
    assert worst(engine(graph, tmp_path / "e", shifted), reference(graph)) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("options", "width"), [({}, 16), ({"dim": 10}, 16), ({"alibi": True}, 24), ({"alibi": True, "dim": 15}, 16)]
)
def test_the_manifest_says_how_wide_the_slots_are(tmp_path: Path, options: dict[str, Any], width: int) -> None:
    built = build(form(options), tmp_path / "e")
    assert built.manifest.kv.layers == ((2, width),)


def test_far_positions_keep_the_bias_exact(tmp_path: Path) -> None:
    """ALiBi's channel holds positions; in float32 it rounds as adding slope · key to the scores does."""
    graph = form({"alibi": True, "kv_heads": 4})
    lowered = lower(graph, capacity=8192)
    feeds = {"input_ids": np.array([3, 5]), "position_ids": np.array([8000, 8001])}
    node = next(n for n in lowered.surgeon.nodes if n.op == "GroupQueryAttention")
    q, k = (t.inputs[0].inputs[0] for t in node.inputs[:2])
    lowered.surgeon.inputs, lowered.surgeon.outputs = lowered.surgeon.inputs[:2], [q, k]
    lowered.surgeon.cleanup()
    q, k = (a.reshape(2, 4, 24).transpose(1, 0, 2) for a in run(lowered, feeds))
    slopes = 0.5 ** np.arange(1, 5)
    scores = 0.3 * q.astype(np.float64) @ k.astype(np.float64).transpose(0, 2, 1)
    plain = 0.3 * q[..., :16].astype(np.float64) @ k[..., :16].astype(np.float64).transpose(0, 2, 1)
    bias = scores - plain
    np.testing.assert_allclose(bias[:, 1, 1] - bias[:, 1, 0], slopes, rtol=1e-3)


@pytest.mark.parametrize("other", [{"softcap": 2.0}, {"sinks": True}])
def test_alibi_beside_what_its_channel_does_not_allow_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    """A softcap would bend the bias, and a sink sees the constant that the channel leaves out."""
    with pytest.raises(UnsupportedModelError, match="m/PagedAttention: ALiBi beside a softcap or sinks"):
        build(form({"alibi": True} | other), tmp_path / "e")
    assert list(tmp_path.iterdir()) == []
