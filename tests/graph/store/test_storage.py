"""Graph folders: written whole or not at all, opened with suspicion."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from conftest import Store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmlab.errors import LlmlabError
from llmlab.graph.graph import MANIFEST, Graph, constants
from llmlab.graph.store import storage
from llmlab.graph.store.deferred import Packed
from llmlab.graph.store.packed import pack, unpack
from llmlab.graph.store.storage import MODEL, WEIGHTS, DeferredValues, write_onnx


class _Sevens(DeferredValues):
    def load(self) -> np.ndarray:
        return np.full(self.shape, 7, self.dtype)


def test_deferred_constants_of_any_size_are_written(tmp_path: Path) -> None:
    x, out = gs.Variable("x", np.dtype(np.float32), [None]), gs.Variable("out", np.dtype(np.float32), [None])
    constants = [gs.Constant(f"c{n}", _Sevens((n,), np.dtype(np.float32))) for n in (3, 1000)]
    node = gs.Node("Concat", inputs=[x, *constants], outputs=[out], attrs={"axis": 0})
    write_onnx(gs.Graph([node], [x], [out], opset=23), tmp_path)
    model = onnx.load(tmp_path / "graph.onnx")
    found = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert {n: (len(a), set(a.tolist())) for n, a in found.items()} == {"c3": (3, {7.0}), "c1000": (1000, {7.0})}
    assert all(isinstance(c._values, _Sevens) for c in constants), "the graph in memory is as before"


@pytest.fixture
def folder(store: Store, tmp_path: Path) -> Path:
    """A copy of a saved graph, to be altered."""
    store.plain("llama")
    return Path(shutil.copytree(store.folder / "llama.plain", tmp_path / "graph"))


def refusal(folder: Path) -> str:
    with pytest.raises(LlmlabError) as caught:
        Graph.load(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def rewrite(folder: Path, change: Callable[[onnx.ModelProto], Any]) -> None:
    model = onnx.load(folder / MODEL, load_external_data=False)
    change(model)
    (folder / MODEL).write_bytes(model.SerializeToString())


def external(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)


def put(tensor: onnx.TensorProto, key: str, value: str) -> None:
    kept = {e.key: e.value for e in tensor.external_data if e.key != key} | {key: value}
    del tensor.external_data[:]
    for k, v in kept.items():
        tensor.external_data.add(key=k, value=v)


def test_a_graph_comes_back_as_it_was(store: Store, tmp_path: Path) -> None:
    serving = store.serving("qwen2").copy()
    serving.assets = {"tokenizer.json": b"{}"}
    back = Graph.load(serving.save(tmp_path / "a" / "g"))
    assert back.kind == "serving" and back.config == serving.config and back.assets == serving.assets
    assert back.op_counts() == serving.op_counts() and back.weight_bytes == serving.weight_bytes
    assert [r.to_dict() for r in back.history] == [r.to_dict() for r in serving.history]
    assert back.kv_layers() == serving.kv_layers()
    big = [t for t in constants(back.surgeon) if t._values.nbytes >= 1024]
    assert big and all(isinstance(t._values, np.memmap) for t in big), "weights are maps, not copies"
    assert json.dumps(back.to_dict()) and "serving" in repr(back) and "<table" in back._repr_mimebundle_()["text/html"]


def test_a_saved_graph_moves(folder: Path, tmp_path: Path) -> None:
    moved = folder.rename(tmp_path / "elsewhere")
    assert Graph.load(moved).kind == "plain"


@pytest.mark.parametrize(
    "location", ["../outside", "/etc/passwd", "graph.onnx", "sub/weights.bin", "./weights.bin", ""]
)
def test_weights_outside_the_folder_are_refused(folder: Path, location: str) -> None:
    (folder.parent / "outside").write_bytes(b"x" * (1 << 20))
    rewrite(folder, lambda m: put(external(m), "location", location))
    assert f"points to {location!r}, expected 'weights.bin' beside the graph" in refusal(folder)


def test_weights_behind_a_link_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "outside")
    (folder / WEIGHTS).symlink_to(folder.parent / "outside")
    assert "which can't be read (a link or no file)" in refusal(folder)


@pytest.mark.parametrize("name", [MANIFEST, MODEL, "tokenizer.json"])
@pytest.mark.parametrize("there", [True, False])
def test_files_behind_a_link_are_refused(folder: Path, name: str, there: bool) -> None:
    """Whole and valid where the link points to, so that nothing but the link can be what is refused; or dangling."""
    outside = folder.parent / "outside"
    if there:
        outside.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    assert f"{name}: a link, expected the file itself" in refusal(folder)


def test_a_folder_behind_a_link_opens(folder: Path, tmp_path: Path) -> None:
    """The user's own link, to the folder as a whole."""
    (tmp_path / "current").symlink_to(folder)
    assert Graph.load(tmp_path / "current").kind == "plain"


@pytest.mark.parametrize(
    ("key", "value"), [("offset", "-4096"), ("offset", "99999999"), ("offset", "x"), ("offset", str(1 << 70))]
)
def test_weights_at_absurd_places_are_refused(folder: Path, key: str, value: str) -> None:
    rewrite(folder, lambda m: put(external(m), key, value))
    assert "truncated or altered" in refusal(folder) or "is malformed" in refusal(folder)


def test_weights_of_absurd_shapes_are_refused(folder: Path) -> None:
    rewrite(folder, lambda m: external(m).dims.__setitem__(0, 1 << 60))
    assert "an absurd shape" in refusal(folder)
    rewrite(folder, lambda m: external(m).dims.__setitem__(0, -1))
    assert "an absurd shape" in refusal(folder)


@pytest.mark.parametrize("where", ["attribute", "subgraph"])
def test_other_tensors_in_other_files_are_refused(folder: Path, where: str) -> None:
    """onnx itself would read such a tensor from wherever it points to."""
    tensor = onnx.TensorProto(name="leak", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    put(tensor, "location", "../outside")
    (folder.parent / "outside").write_bytes(b"x" * 16)
    node = onnx.helper.make_node("Constant", [], ["leaked"], value=tensor)
    if where == "subgraph":
        inner = onnx.helper.make_graph([node], "inner", [], [onnx.helper.make_tensor_value_info("leaked", 1, [4])])
        node = onnx.helper.make_node("If", ["input_ids"], ["leaked2"], then_branch=inner, else_branch=inner)
    rewrite(folder, lambda m: m.graph.node.append(node))
    assert "'leak' lies in another file" in refusal(folder)


@pytest.mark.parametrize("name", [MODEL, WEIGHTS, MANIFEST])
@pytest.mark.parametrize("how", ["missing", "empty", "half"])
def test_files_that_are_cut_are_refused(folder: Path, name: str, how: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if how != "missing":
        (folder / name).write_bytes(data[: len(data) // 2] if how == "half" else b"")
    assert name in refusal(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "graph format 2, this llmlab reads 1"),
        ({"format": None}, "graph format None"),
        ({"format": True}, "graph format True"),
        ({"config": None}, "expected a JSON object"),
        ({"config": {}}, "no 'model_type' in it"),
        ({"history": [1]}, "its history is malformed"),
        ({"history": [{}]}, "its history is malformed"),
        ({"history": 3}, "its history is malformed"),
    ],
)
def test_manifests_that_do_not_fit(folder: Path, change: dict[str, Any], reason: str) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(data | change))
    assert reason in refusal(folder)


@pytest.mark.parametrize("key", ["config", "history", "references"])
@pytest.mark.parametrize("value", [True, -1, 1 << 70, 0.5, "x", [[]], [None], {"a": []}], ids=str)
def test_manifests_of_other_types(folder: Path, key: str, value: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {key: value}))
    refusal(folder)


MANIFESTS = {
    "deep": (b'{"format": 1, "history": ' + b"[" * 100_000, "not valid JSON"),
    "deep and whole": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "not valid JSON"),
    "a list": (b"[]", "graph format None"),
    "text": (b'"format"', "graph format None"),
    "not UTF-8": (b'{"format": "\xff"}', "not valid JSON"),
    "a number of many digits": (b'{"format": ' + b"9" * 9000 + b"}", "not valid JSON"),
}


@pytest.mark.parametrize(("data", "reason"), MANIFESTS.values(), ids=MANIFESTS)
def test_manifests_that_are_none(folder: Path, data: bytes, reason: str) -> None:
    (folder / MANIFEST).write_bytes(data)
    assert reason in refusal(folder)


@pytest.mark.parametrize("name", [MANIFEST, MODEL, "tokenizer.json"])
def test_files_of_absurd_sizes(folder: Path, name: str) -> None:
    """Sparse: they take no room, and must not be read."""
    with (folder / name).open("ab") as file:
        file.truncate(1 << 40)
    assert f"{name}: 1099511627776 bytes, more than" in refusal(folder)


@pytest.mark.parametrize("name", [MANIFEST, MODEL, WEIGHTS])
def test_a_pipe_in_place_of_a_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert name in refusal(folder)


@pytest.mark.parametrize("name", [MANIFEST, MODEL, WEIGHTS])
def test_a_folder_in_place_of_a_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    assert name in refusal(folder)


def test_a_folder_without_a_graph(tmp_path: Path) -> None:
    assert "no graph.json there; expected a folder that Graph.save or `llmlab export` wrote" in refusal(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_model_raises_nothing_else(folder: Path, data: st.DataObject) -> None:
    path = folder / MODEL
    original = folder / "original"
    if not original.exists():
        original.write_bytes(path.read_bytes())
    damaged = bytearray(original.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(damaged[: data.draw(st.sampled_from([len(damaged), len(damaged) // 2]))]))
    try:
        Graph.load(folder)
    except LlmlabError as problem:
        assert "\n" not in str(problem)


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_saving_that_is_interrupted_leaves_nothing(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch, stop: Any
) -> None:
    before = {p: p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()}
    monkeypatch.setattr(storage, "loaded", lambda values: (_ for _ in ()).throw(stop()))
    for path in (folder, folder.parent / "new"):
        with pytest.raises(stop):
            store.plain("llama").save(path, overwrite=True)
    assert {p: p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["graph"]


def test_a_graph_is_saved_over_itself(folder: Path) -> None:
    """Its weights are maps of the files that are replaced."""
    graph = Graph.load(folder)
    before = {t.name: np.array(t.values) for t in constants(graph.surgeon)}
    graph.save(folder, overwrite=True)
    after = {t.name: np.array(t.values) for t in constants(Graph.load(folder).surgeon)}
    assert before.keys() == after.keys() and all(np.array_equal(before[n], after[n]) for n in before)


class _Counting(DeferredValues):
    def load(self) -> np.ndarray:
        return (np.arange(np.prod(self.shape)) % 16 - 8).astype(self.dtype).reshape(self.shape)


@pytest.mark.parametrize("kind", ["deferred", "array"])
@pytest.mark.parametrize("shape", [(6, 5), (3, 7), (64, 96)])
def test_four_bits_take_half_a_byte(store: Store, tmp_path: Path, shape: tuple[int, ...], kind: str) -> None:
    """Inside the protobuf and beside it; as ONNX Runtime reads them, and as they come back."""
    import onnxruntime as ort

    int4, wide = np.dtype(ml_dtypes.int4), np.dtype(np.float32)
    expected = _Counting(shape, int4).load()
    values = gs.Constant("values", _Counting(shape, int4) if kind == "deferred" else Packed.of(expected))
    out = gs.Variable("out", wide, list(shape))
    node = gs.Node("DequantizeLinear", inputs=[values, gs.Constant("scale", np.array(0.5, np.float32))], outputs=[out])
    surgeon = gs.Graph([node], [], [out], opset=23)
    write_onnx(surgeon, tmp_path)
    half = -(-expected.size // 2)
    assert values._values.nbytes == half
    assert (tmp_path / WEIGHTS).stat().st_size == (half if half >= 1024 else 0)
    session = ort.InferenceSession(tmp_path / MODEL, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {})[0], expected.astype(np.float32) / 2)
    back = storage.read_onnx(tmp_path)
    (constant, _) = storage.constants(back)
    assert isinstance(constant._values, Packed) and constant.dtype == int4
    np.testing.assert_array_equal(storage.array(constant), expected)
    again = tmp_path / "again"
    again.mkdir()
    write_onnx(back, again)
    assert (again / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
    (inside, _) = from_proto_bytes(back)
    np.testing.assert_array_equal(inside, expected)


def from_proto_bytes(graph: gs.Graph) -> list[np.ndarray]:
    return [onnx.numpy_helper.to_array(t) for t in gs.export_onnx(graph, do_type_check=False).graph.initializer]


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=40))
def test_packing(numbers: list[int]) -> None:
    values = np.array(numbers, np.int8).astype(ml_dtypes.int4)
    packed = pack(values)
    assert packed.tobytes() == onnx.numpy_helper.from_array(values).raw_data, "as ONNX has it"
    assert unpack(packed, values.shape, values.dtype).tolist() == values.tolist()
