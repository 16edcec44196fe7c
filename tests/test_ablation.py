"""`inspect --passes`: each pass left out in turn; which are required, and that a model that says something else is found."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs
import pytest
from conftest import Store
from rich.console import Console

import llmlab as ll
from llmlab import ablation
from llmlab.ablation import Ablated, Ablation, Cost, measure
from llmlab.errors import InputError
from llmlab.graph.optimize import PASSES


class Doubled(ll.Pass):
    """Logits twice as large: what no pass may do."""

    name = "doubled"

    def pattern(self, node: gs.Node) -> ll.Match | None:
        return ll.Match(node=node) if node.name == "lm_head/MatMul" else None

    def rewrite(self, edit: ll.Editor, match: ll.Match) -> None:
        old = match.node.outputs[0]
        sum_ = edit.add("Add", "lm_head", [old, old], dtype=old.dtype, shape=old.shape)
        edit.replace(old, sum_)


@pytest.fixture(scope="module")
def measured(store: Store) -> Ablation:
    with ll.registered_pass(Doubled, before="pack_tokens"):
        rows = list(measure(store.plain("llama"), threads=1, rounds=1))
    assert {total for _, total in rows} == {len(rows)}
    return Ablation("tiny", tuple(row for row, _ in rows))


def test_every_pass_has_its_row(measured: Ablation) -> None:
    names = list(dict.fromkeys(make().name for make in PASSES))
    assert measured.rows[0].verdict == "all passes"
    assert sorted(row.name for row in measured.rows[1:]) == sorted([*names, "doubled"])
    assert {row.verdict for row in measured.rows[1:]} <= {"required", "idle", "measured", "wrong"}


def test_verdicts(measured: Ablation) -> None:
    rows = {row.name: row for row in measured.rows}
    everything = rows[""]
    for name in ("page_attention", "pack_tokens", "recognise_mask", "gather_logits"):
        assert rows[name].verdict == "required" and rows[name].reason and rows[name].earns(everything), name
    assert "can't be paged" in rows["page_attention"].reason
    assert rows["doubled"].verdict == "wrong" and "logits are off by" in rows["doubled"].reason
    norm = rows["fuse_rms_norm"]
    assert norm.verdict == "measured" and norm.nodes > everything.nodes and norm.earns(everything)
    assert set(norm.steps) == {"decode B=1", "decode B=8", "prefill 63"} == set(everything.steps)
    assert all(cost.ms > 0 and cost.low <= cost.ratio <= cost.high for cost in norm.steps.values())
    for row in measured.rows:
        assert row.verdict != "idle" or not row.earns(everything)


def test_a_pass_that_is_good_for_nothing() -> None:
    same = {"nodes": 9, "engine_nodes": 5, "operators": 3, "weight_bytes": 100}
    first = Ablated("", "all passes", **same)
    slower, unsure = Cost(2.0, 1.01, 1.1, 1.2), Cost(2.0, 0.99, 1.1, 1.2)
    assert not Ablated("p", "measured", steps={"decode": unsure}, **same).earns(first)
    assert Ablated("p", "measured", steps={"decode": slower}, **same).earns(first)
    assert Ablated("p", "measured", **same | {"weight_bytes": 101}).earns(first)
    assert str(slower) == "+10.0%" and str(unsure) == "≈ 0 (+10.0%)"
    assert "p: earns nothing" in shown(Ablation("m", (first, Ablated("p", "measured", **same))))


def shown(result: Ablation, width: int = 160) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(result)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_it_can_be_shown_and_told_to_scripts(measured: Ablation) -> None:
    table = shown(measured)
    assert "page_attention: required" in table and "prefill 63" in table
    assert max(map(len, shown(measured, 60).splitlines())) <= 60
    data = json.loads(json.dumps(measured.to_dict()))
    assert data["kind"] == "passes" and [row["name"] for row in data["rows"]] == [row.name for row in measured.rows]
    assert {row["name"]: row["earns"] for row in data["rows"]}["page_attention"] is True


def test_nothing_is_left_behind(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it is stopped in the middle, as Ctrl-C does."""
    monkeypatch.setattr(ablation.tempfile, "tempdir", str(tmp_path))
    rows = measure(store.plain("llama"), threads=1, rounds=1)
    next(rows)
    assert list(tmp_path.iterdir())
    rows.close()
    assert not list(tmp_path.iterdir())

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation._Variant, "seconds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(measure(store.plain("llama"), threads=1, rounds=1))
    assert not list(tmp_path.iterdir())


def test_a_serving_graph_is_refused(store: Store) -> None:
    with pytest.raises(InputError, match="serving graph already"):
        next(measure(store.serving("llama")))
