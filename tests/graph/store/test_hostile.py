"""ONNX files that lie: one line each, with the path, what was found and what to do; nothing big is made, nothing hangs."""

from __future__ import annotations

import gzip
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from broken_files import CONFIG, plain_model, write
from onnx import AttributeProto, TensorProto, helper
from typer.testing import CliRunner

from llmlab import cli
from llmlab.errors import LlmlabError
from llmlab.graph.export import export
from llmlab.graph.optimize import optimize

Change = Callable[[onnx.ModelProto], Any]


def refusal(path: Path) -> str:
    """The one line that opening and optimizing `path` raises, within seconds and without much memory."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LlmlabError) as caught:
        optimize(export(path, config=CONFIG))
    assert time.monotonic() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20, "more than 2 GB"
    message = str(caught.value)
    assert "\n" not in message
    return message


def node(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == op)


def weight(model: onnx.ModelProto, name: str = "wq") -> TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def add(model: onnx.ModelProto, op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
    domain = attributes.pop("domain", "")
    model.graph.node.insert(0, helper.make_node(op, inputs, outputs, f"extra/{op}", domain=domain, **attributes))


def cycle(model: onnx.ModelProto) -> None:
    node(model, "Softmax").input[0] = "logits"


def attribute_of_another_type(model: onnx.ModelProto) -> None:
    found = node(model, "Softmax").attribute[0]
    found.CopyFrom(helper.make_attribute("axis", "last"))


def not_utf8(model: onnx.ModelProto) -> bytes:
    """The file, one name spoiled: the library itself doesn't write such a name."""
    return model.SerializeToString().replace(b"model.layers.0/gate", b"model.layers.0/\xff\xfe\xfd\xfc")


def deep(model: onnx.ModelProto) -> None:
    """Subgraphs as deep as protobuf reads them, the innermost with a mistake."""
    value = helper.make_tensor_value_info("inner", TensorProto.FLOAT, [1])
    leaf = helper.make_graph([helper.make_node("Identity", ["nothing"], ["inner"], "leaf")], "leaf", [], [value])
    graph = leaf
    for level in range(28):
        made = helper.make_node("If", ["condition"], ["inner"], f"if{level}", then_branch=graph, else_branch=leaf)
        graph = helper.make_graph([made], f"g{level}", [], [value])
    model.graph.node.append(helper.make_node("If", ["condition"], ["z"], "if", then_branch=graph, else_branch=leaf))
    model.graph.initializer.append(helper.make_tensor("condition", TensorProto.BOOL, [], [True]))


def function(name: str, calls: list[str], domain: str = "mine") -> onnx.FunctionProto:
    nodes, last = [], "x"
    for i, callee in enumerate(calls):
        nodes.append(helper.make_node(callee, [last], [f"t{i}"], domain=domain if callee.startswith("f") else ""))
        last = f"t{i}"
    return helper.make_function(
        domain, name, ["x"], [last], nodes, [helper.make_opsetid("", 23), helper.make_opsetid(domain, 1)]
    )


def call_functions(model: onnx.ModelProto, functions: list[onnx.FunctionProto]) -> None:
    model.functions.extend(functions)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    add(model, functions[0].name, ["embed"], ["called"], domain="mine")


def laughs(model: onnx.ModelProto) -> None:
    """Every function calls the next ten times: 10³⁰ nodes in a kilobyte."""
    call_functions(model, [function(f"f{i}", [f"f{i + 1}"] * 10) for i in range(30)] + [function("f30", ["Identity"])])


def with_functions(*functions: onnx.FunctionProto) -> Change:
    return lambda model: call_functions(model, list(functions))


def external(location: str, **entries: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = weight(model)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **entries}.items():
            tensor.external_data.add(key=key, value=value)

    return change


def overlapping(model: onnx.ModelProto) -> None:
    for name, offset in (("wq", "0"), ("wk", "16")):
        tensor = weight(model, name)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="data.bin")
        tensor.external_data.add(key="offset", value=offset)


STRUCTURE: dict[str, tuple[Change, str]] = {
    "a cycle": (cycle, "comes before the node that makes 'logits' (a cycle, or nodes out of order)"),
    "a node that reads itself": (
        lambda m: node(m, "Softmax").input.__setitem__(0, node(m, "Softmax").output[0]),
        "a cycle",
    ),
    "an initializer is missing": (lambda m: m.graph.initializer.remove(weight(m)), "reads what nothing makes: 'wq'"),
    "a name twice": (lambda m: node(m, "Softmax").output.__setitem__(0, "x"), "makes 'x', which there is already"),
    "an initializer twice": (
        lambda m: m.graph.initializer.append(weight(m)),
        "the graph has two initializers named 'wq'",
    ),
    "an input twice": (lambda m: m.graph.input.append(m.graph.input[0]), "the graph has two inputs named 'input_ids'"),
    "an output that nothing makes": (
        lambda m: m.graph.output[0].__setattr__("name", "scores"),
        "nothing makes the output 'scores' of the graph",
    ),
    "no outputs": (lambda m: m.graph.ClearField("output"), "the graph has no outputs"),
    "a node without outputs": (lambda m: node(m, "Softmax").ClearField("output"), "(Softmax) has no outputs"),
    "a node without inputs": (lambda m: node(m, "Softmax").ClearField("input"), "(Softmax) has 0 inputs, expected 1"),
    "too many inputs": (lambda m: node(m, "Softmax").input.append("x"), "(Softmax) has 2 inputs, expected 1"),
    "an input left out": (
        lambda m: node(m, "MatMul").input.__setitem__(1, ""),
        "leaves out one of its first 2 inputs, which it needs",
    ),
    "an unknown operator": (
        lambda m: node(m, "Softmax").__setattr__("op_type", "Softmin"),
        "(Softmin): opset 23 has no operator of that name",
    ),
    "an unknown domain": (
        lambda m: add(m, "Magic", ["embed"], ["magic"], domain="evil.example"),
        "(Magic) is of the operator set 'evil.example', which llmlab doesn't know, and has no function that defines it",
    ),
    "an unknown opset": (lambda m: m.opset_import[0].__setattr__("version", 99), "operator set (opset) 99"),
    "a negative opset": (lambda m: m.opset_import[0].__setattr__("version", -1), "operator set (opset) -1"),
    "no opset": (lambda m: m.ClearField("opset_import"), "operator set (opset) none"),
    "two opsets": (
        lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx", 18)),
        "two versions of the operator set ''",
    ),
    "a format of the future": (lambda m: m.__setattr__("ir_version", 99), "ir_version 99"),
    "an attribute of another type": (
        attribute_of_another_type,
        "(Softmax): attribute 'axis' is of type STRING, expected INT",
    ),
    "an unknown attribute": (
        lambda m: node(m, "Softmax").attribute.append(helper.make_attribute("speed", 3)),
        "has an attribute 'speed', which the operator doesn't know",
    ),
    "an attribute twice": (
        lambda m: node(m, "Softmax").attribute.append(node(m, "Softmax").attribute[0]),
        "has two attributes 'axis'",
    ),
    "an attribute without a type": (
        lambda m: node(m, "Softmax").attribute[0].__setattr__("type", AttributeProto.UNDEFINED),
        "attribute 'axis' has a type that can't be used",
    ),
    "an attribute missing": (lambda m: add(m, "Cast", ["embed"], ["cast"]), "(Cast) has no attribute 'to'"),
    "a name of a megabyte": (
        lambda m: node(m, "Softmax").__setattr__("name", "x" * (1 << 20)),
        "a name of 1048576 characters ('xxxxxxxxxxxxxxxxxxxx'…)",
    ),
    "a name of several lines": (
        lambda m: node(m, "Softmax").__setattr__("name", "a\nllmlab: all is well"),
        "a name holds control characters",
    ),
    "sparse weights": (
        lambda m: m.graph.sparse_initializer.append(onnx.SparseTensorProto(dims=[4])),
        "sparse weights; store them dense",
    ),
    "subgraphs, deep": (deep, "node 'leaf' (Identity) reads what nothing makes: 'nothing'"),
    "a value that is no tensor": (
        lambda m: m.graph.value_info.add(name="x").type.opaque_type.SetInParent(),
        "'x' is no tensor (opaque)",
    ),
    "a list of what is no tensor": (
        lambda m: m.graph.value_info.add(name="x").type.sequence_type.elem_type.opaque_type.SetInParent(),
        "'x' is no tensor (opaque)",
    ),
    "a name that is not UTF-8": (not_utf8, "not UTF-8"),
    "an attribute's text that is not UTF-8": (
        lambda m: add(m, "Gelu", ["embed"], ["gelu"], approximate=b"\xff"),
        "text that is not UTF-8",
    ),
    "a function that calls itself": (with_functions(function("f", ["f"])), "function 'f' calls itself"),
    "functions that call each other": (
        with_functions(function("f", ["fg"]), function("fg", ["f"])),
        "calls itself",
    ),
    "functions without end": (laughs, "more than 1000000 nodes"),
    "a function twice": (
        with_functions(function("f", ["Identity"]), function("f", ["Neg"])),
        "two functions of one name",
    ),
}
SIZES: dict[str, tuple[Change, str]] = {
    "a negative dimension": (
        lambda m: weight(m).dims.__setitem__(0, -1),
        "initializer 'wq' has an absurd shape [-1, 8]",
    ),
    "a dimension beyond 2³¹": (lambda m: weight(m).dims.__setitem__(0, 1 << 40), "absurd shape [1099511627776, 8]"),
    "dimensions that overflow": (
        lambda m: weight(m).dims.extend([(1 << 31) - 1] * 4),
        "its data has another size: truncated or altered",
    ),
    "a thousand dimensions": (lambda m: weight(m).dims.extend([1] * 1000), "absurd shape"),
    "a shape that is not the data's": (
        lambda m: weight(m).dims.__setitem__(0, 9),
        "of shape [9, 8] needs 288 bytes, and its data has another size",
    ),
    "a type that is not the data's": (lambda m: weight(m).__setattr__("data_type", TensorProto.DOUBLE), "another size"),
    "an unknown type": (lambda m: weight(m).__setattr__("data_type", 99), "has type 99, which ONNX doesn't know"),
    "text as weights": (
        lambda m: weight(m).__setattr__("data_type", TensorProto.STRING),
        "is of a kind that a language model has no use for",
    ),
    "an absurd declared dimension": (
        lambda m: m.graph.value_info.append(helper.make_tensor_value_info("x", 1, [-5])),
        "'x' has an absurd shape [-5]",
    ),
    "shapes that don't fit": (
        lambda m: weight(m).dims.__setitem__(slice(None), [4, 16]),
        "(MatMul): its shapes or types don't fit: ",
    ),
    "types that don't fit": (
        lambda m: node(m, "Add").input.__setitem__(1, "input_ids"),
        "(Add): input 1 is a tensor(int64), another a tensor(float): expected one type",
    ),
    "a type the operator doesn't take": (
        lambda m: node(m, "Softmax").input.__setitem__(0, "input_ids"),
        "(Softmax): input 0 is a tensor(int64), which the operator doesn't take",
    ),
}
EXTERNAL: dict[str, tuple[Change, str]] = {
    "outside": (external("../outside.bin"), "points to '../outside.bin', expected a file inside the folder"),
    "outside, hidden": (external("sub/../../outside.bin"), "expected a file inside the folder"),
    "absolute": (external("/etc/passwd"), "points to '/etc/passwd', expected a file inside the folder"),
    "a folder of Windows": (external("..\\outside.bin"), "expected a file inside the folder"),
    "a drive": (external("C:outside.bin"), "expected a file inside the folder"),
    "a NUL": (external("data.bin\0.txt"), "control characters"),
    "nothing": (external(""), "points to '', expected a file inside the folder"),
    "the folder": (external("."), "expected a file inside the folder"),
    "a link": (external("link.bin"), "points to 'link.bin', which can't be read (a link or no file)"),
    "a folder that is a link": (external("linked/outside.bin"), "which can't be read (a link or no file)"),
    "a folder as data": (external("sub"), "which can't be read (a link or no file)"),
    "a pipe": (external("pipe"), "which can't be read (a link or no file)"),
    "missing": (external("nowhere.bin"), "which can't be read (No such file or directory)"),
    "beyond the end": (external("data.bin", offset="4000"), "wants bytes 4000 to 4256 of data.bin, which has 4096"),
    "an offset that overflows": (external("data.bin", offset=str(1 << 64)), "wants bytes 18446744073709551616"),
    "an offset of many digits": (external("data.bin", offset="9" * 900), "its offset is malformed"),
    "a negative offset": (external("data.bin", offset="-8"), "its offset is malformed ('-8')"),
    "an offset in other digits": (external("data.bin", offset="٣"), "its offset is malformed"),
    "a length that lies": (external("data.bin", length="99999999"), "needs 256 bytes, its entry gives it 99999999"),
    "overlapping": (overlapping, "tensors overlap at byte 16 of data.bin"),
}


@pytest.mark.parametrize(("change", "reason"), [*STRUCTURE.values(), *SIZES.values()], ids=[*STRUCTURE, *SIZES])
def test_graphs(tmp_path: Path, change: Change, reason: str) -> None:
    message = refusal(write(tmp_path, change))
    assert reason in message and str(tmp_path) in message


@pytest.mark.parametrize(("change", "reason"), EXTERNAL.values(), ids=EXTERNAL)
def test_external_data(tmp_path: Path, change: Change, reason: str) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    for path in (tmp_path / "outside.bin", tmp_path / "out" / "outside.bin", folder / "data.bin"):
        path.write_bytes(bytes(4096))
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    (folder / "linked").symlink_to(tmp_path / "out")
    os.mkfifo(folder / "pipe")
    assert reason in refusal(write(folder, change))


def test_external_data_in_a_folder_inside(tmp_path: Path) -> None:
    """What the cases above would let through if they let through everything: the same file, a good entry."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "data.bin").write_bytes(bytes(16) + np.ones((8, 8), np.float32).tobytes())
    graph = export(write(tmp_path, external("sub/data.bin", offset="16", length="256")), config=CONFIG)
    (found,) = [t for t in graph.surgeon.tensors().values() if t.name == "wq"]
    assert np.array_equal(found.values, np.ones((8, 8)))


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_links_beside_the_file_are_not_followed(tmp_path: Path, name: str) -> None:
    """They would bring whatever they point to into the engine."""
    folder = tmp_path / "model"
    folder.mkdir()
    path = write(folder)
    (folder / "config.json").write_text(CONFIG_TEXT)
    (folder / "tokenizer.json").write_text("{}")
    assert export(path).assets == {"tokenizer.json": b"{}"}
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(LlmlabError, match=f"{name}: a link, expected the file itself"):
        export(path)


# Arithmetic of the mask that asks for 4 GB and more, which there may well be. It is executed to find out what the mask is.
BOMBS: dict[str, list[tuple[str, list[str], str, dict[str, Any]]]] = {
    "ConstantOfShape": [("ConstantOfShape", ["huge_shape"], "bomb", {})],
    "Expand": [("Expand", ["one", "huge_shape"], "bomb", {})],
    "Tile": [("Expand", ["one", "flat"], "row", {}), ("Tile", ["row", "huge_shape"], "bomb", {})],
    "Range": [("Range", ["zero", "huge", "step"], "bomb", {})],
    "outer product": [
        ("Range", ["zero", "large", "step"], "row", {}),
        ("Unsqueeze", ["row", "axis"], "column", {}),
        ("Mul", ["row", "column"], "bomb", {}),
    ],
    "Pad": [("Pad", ["one_by_one", "pads"], "bomb", {})],
}


def bomb(name: str, *, on_positions: bool) -> Change:
    """Add the bomb's sum to the mask; folded with the constants, unless its size depends on the positions."""

    def change(model: onnx.ModelProto) -> None:
        given = {
            "huge_shape": np.array([1 << 15, 1 << 16], np.int64),
            "one": np.ones((1,), np.float32),
            "one_by_one": np.ones((1, 1), np.float32),
            "flat": np.array([1, 1], np.int64),
            "zero": np.array(0, np.float32),
            "step": np.array(1, np.float32),
            "huge": np.array(1 << 30, np.float32),
            "large": np.array(1 << 16, np.float32),
            "axis": np.array([1], np.int64),
            "pads": np.array([0, 0, 1 << 15, 1 << 16], np.int64),
        }
        given = {f"bomb.{k}": v for k, v in given.items()}
        nodes = [
            helper.make_node(op, [f"bomb.{i}" for i in inputs], [f"bomb.{o}"], f"bomb/{op}", **a)
            for op, inputs, o, a in BOMBS[name]
        ]
        nodes.append(helper.make_node("ReduceSum", ["bomb.bomb"], ["total"], "bomb/Sum", keepdims=0))
        if on_positions:
            # zero · the largest position: known only when it runs
            nodes = [
                helper.make_node("ReduceMax", ["position_ids"], ["last"], "bomb/Max", keepdims=0),
                helper.make_node("Sub", ["last", "last"], ["nought"], "bomb/Sub"),
                helper.make_node("Cast", ["nought"], ["noughtf"], "bomb/Cast", to=TensorProto.FLOAT),
                *(
                    helper.make_node(
                        "Add", [k, "nought" if v.dtype == np.int64 else "noughtf"], [f"{k}.late"], f"bomb/{k}"
                    )
                    for k, v in given.items()
                ),
                *nodes,
            ]
            for made in nodes[3 + len(given) :]:
                for i, read in enumerate(made.input):
                    made.input[i] = f"{read}.late" if read in given else read
        mask = node(model, "Where")
        nodes.append(helper.make_node("Add", [mask.output[0], "total"], ["spoiled"], "bomb/Add"))
        for reader in model.graph.node:
            for i, read in enumerate(reader.input):
                if read == mask.output[0]:
                    reader.input[i] = "spoiled"
        at = list(model.graph.node).index(mask) + 1
        for offset, made in enumerate(nodes):
            model.graph.node.insert(at + offset, made)
        model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in given.items())

    return change


@pytest.mark.parametrize("on_positions", [False, True])
@pytest.mark.parametrize("name", BOMBS)
def test_arithmetic_that_asks_for_everything(tmp_path: Path, name: str, on_positions: bool) -> None:
    assert "can't be evaluated" in refusal(write(tmp_path, bomb(name, on_positions=on_positions)))


def test_a_chain_of_thousands_of_nodes(tmp_path: Path) -> None:
    """Deeper than Python's stack."""

    def change(model: onnx.ModelProto) -> None:
        last = node(model, "Gather").output[0]
        made = [helper.make_node("Neg", [last if i == 0 else f"n{i - 1}"], [f"n{i}"], f"n{i}") for i in range(1500)]
        at = list(model.graph.node).index(node(model, "Gather")) + 1
        for reader in list(model.graph.node)[at:]:
            for i, read in enumerate(reader.input):
                if read == last:
                    reader.input[i] = "n1499"
        rest = [onnx.NodeProto.FromString(n.SerializeToString()) for n in list(model.graph.node)]
        model.graph.ClearField("node")
        model.graph.node.extend([*rest[:at], *made, *rest[at:]])

    serving = optimize(export(write(tmp_path, change), config=CONFIG))
    assert serving.kind == "serving" and serving.op_counts()["Neg"] == 1500


def compressed(path: Path) -> None:
    path.write_bytes(gzip.compress(plain_model().SerializeToString()))


def half(path: Path) -> None:
    data = plain_model().SerializeToString()
    path.write_bytes(data[: len(data) // 2])


def folder(path: Path) -> None:
    path.mkdir()


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "there is no graph in it"),
    "text": (lambda path: path.write_text("to whom it may concern\n" * 9), "not an ONNX model"),
    "JSON": (lambda path: path.write_text('{"graph": []}'), "not an ONNX model"),
    "gzip": (compressed, "not an ONNX model"),
    "truncated": (half, "not an ONNX model: truncated or altered"),
    "a folder": (folder, "can't be read (not a regular file)"),
    "a pipe": (os.mkfifo, "can't be read (not a regular file)"),
    "missing": (lambda path: None, "can't be read (No such file or directory)"),
}


@pytest.mark.parametrize(("make", "reason"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("verb", ["export", "build", "inspect"])
def test_files_through_the_command_line(tmp_path: Path, make: Callable[[Path], Any], reason: str, verb: str) -> None:
    path = tmp_path / "model.onnx"
    make(path)
    (tmp_path / "config.json").write_text(CONFIG_TEXT)
    before = sorted(tmp_path.iterdir())
    more = [] if verb == "inspect" else ["-o", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, [verb, str(path), *more])
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"llmlab: {path}: ") and reason in line
    assert sorted(tmp_path.iterdir()) == before


CONFIG_TEXT = '{"model_type": "toy", "vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}'


def test_values_that_have_no_type(tmp_path: Path) -> None:
    """The control of "a value that is no tensor": exporters may leave the type out, at the top and inside subgraphs."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.value_info.add(name="x")
        inner = helper.make_graph([helper.make_node("Neg", ["embed"], ["i"], "neg")], "inner", [], [])
        inner.output.add(name="i")
        model.graph.node.insert(0, helper.make_node("If", ["yes"], ["z"], "if", then_branch=inner, else_branch=inner))
        model.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))

    assert optimize(export(write(tmp_path, change), config=CONFIG)).kind == "serving"
