"""Two engines of one model: layers that compute the same serving nodes are beside each other, however they were fused."""

from __future__ import annotations

from llmlab.evaluate.layers.align import align
from llmlab.evaluate.layers.model import CompiledLayer, EngineLayers


def layer(
    name: str, nodes: str, seconds: float | None = 1e-3, kind: str = "product", dtype: str = "float32"
) -> CompiledLayer:
    times = {} if seconds is None else {"decode": seconds}
    return CompiledLayer(name, kind, tuple(nodes.split()), ("K",), dtype, times)


def engine(name: str, *layers: CompiledLayer) -> EngineLayers:
    return EngineLayers(name, "onnxruntime", layers, ())


A = engine(
    "a",
    layer("model.layers.0.o", "mul0 add0"),
    layer("model.layers.0.norm", "norm0", 1e-5, "norm"),
    layer("model.layers.1.o", "mul1 add1"),
    layer("model.layers.1.norm", "norm1", 1e-5, "norm"),
    layer("head", "mulh"),
)
B = engine(
    "b",
    layer("model.layers.0.o", "mul0", 4e-4, dtype="int4 × int8"),
    layer("model.layers.0.norm", "add0 norm0", 2e-5, "norm"),
    layer("model.layers.1.o", "mul1", 4e-4, dtype="int4 × int8"),
    layer("model.layers.1.norm", "add1 norm1", 2e-5, "norm"),
    layer("head", "other mulh", 2e-3),
    layer("copy", "", 1e-6, "rest"),
)


def test_different_fusions_become_groups() -> None:
    pairs = align(A, B).pairs
    assert [(tuple(x.name for x in p.first), tuple(x.name for x in p.second)) for p in pairs] == [
        (("model.layers.0.o", "model.layers.0.norm"),) * 2,
        (("model.layers.1.o", "model.layers.1.norm"),) * 2,
        (("head",), ("head",)),
        ((), ("copy",)),
    ]


def test_names_decide_nothing() -> None:
    one, two = (
        engine("a", layer("same", "x"), layer("other", "y")),
        engine("b", layer("same", "y"), layer("third", "x")),
    )
    assert [(p.first[0].name, p.second[0].name) for p in align(one, two).pairs] == [
        ("same", "third"),
        ("other", "same"),
    ]


def test_won_and_lost_are_said() -> None:
    rows = align(A, B).rows()
    assert [row.name for row in rows] == ["model.layers.0–1.o (2×) with norm", "head", "copy"]
    assert rows[0].verdict("decode") == ("won", "won 1.18 ms (2.4×)")
    assert rows[1].verdict("decode") == ("lost", "lost 1.00 ms (2.0×)")
    assert rows[2].verdict("decode") == ("", "only in one")
    assert rows[0].dtype(0) == "float32" and rows[0].dtype(1) == "int4 × int8"
    assert align(A, A).rows()[0].verdict("decode") == ("same", "same")
    assert rows[0].verdict("prefill") == ("", "")
    assert align(A, B).rows(lambda pair: pair.kind == "rest")[0].name == "copy"
    assert len(align(A, B).to_dict()["pairs"]) == 4


def test_without_times_nothing_is_won() -> None:
    one = engine("a", layer("x", "n", None))
    assert align(one, one).rows()[0].verdict("decode") == ("", "")


def test_layers_of_another_phase_are_left_out() -> None:
    only = CompiledLayer("x", "product", ("n",), ("K",), "int8", {"prefill": 1.0}, phases=("prefill",))
    assert align(A, engine("b", only)).pairs[-1].second == ()
    assert align(A, engine("b", only), "prefill").pairs[-1].second == (only,)
