"""Mutations of valid files, by number, and the worker process that opens them."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import broken_files
import onnx
from onnx import TensorProto, helper

LIMIT = 30.0  # seconds a case may take
MEMORY = 6 << 30  # bytes of address space beyond what the worker starts with
WORDS = (
    "",
    "x",
    "logits",
    "input_ids",
    "../x",
    "a\nb",
    "\0",
    "é",
    "wq",
    "Softmax",
    "If",
    "Loop",
    "MatMul",
    "ai.onnx",
    "9" * 40,
)
NUMBERS = (0, 1, -1, 2, 3, 7, 2**15, 2**31 - 1, 2**31, 2**40, -(2**63), 2**63 - 1)


def seeds(store: Any, folder: Path) -> list[Path]:
    """Folders with a valid file each: `model.onnx` and a config, or what `Graph.save` wrote."""
    from llmlab.graph.export import export
    from llmlab.graph.optimize import optimize

    config = json.dumps(broken_files.CONFIG)
    plain = folder / "plain"
    plain.mkdir()
    (plain / "config.json").write_text(config)
    broken_files.write(plain)
    beside = folder / "external"
    beside.mkdir()
    (beside / "config.json").write_text(config)
    onnx.save(
        broken_files.plain_model(),
        beside / "model.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=100,
    )
    older = folder / "opset-18"
    older.mkdir()
    (older / "config.json").write_text(config)
    broken_files.write(older, broken_files.of_opset_18)
    graph = export(plain / "model.onnx", config=broken_files.CONFIG)
    graph.save(folder / "saved-plain")
    optimize(graph).save(folder / "saved-serving")
    return [plain, beside, older, folder / "saved-plain", folder / "saved-serving"]


def mutant(folders: list[Path], number: int) -> dict[str, bytes]:
    """The files of the mutant `number`: of one of `folders`, with one file changed in one to three ways."""
    rng = random.Random(number)
    folder = rng.choice(folders)
    files = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
    name = rng.choice([n for n in files if n.endswith(".onnx")] * 6 + list(files))
    data = files[name]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if name.endswith(".onnx") and rng.random() < 0.75:
            data = structured(data, rng)
        elif name.endswith(".json") and rng.random() < 0.6:
            data = _json(data, rng)
        else:
            data = _bytes(data, rng, files)
    return files | {name: data}


def _bytes(data: bytes, rng: random.Random, files: dict[str, bytes]) -> bytes:
    """Flip, cut, repeat, or splice with another file."""
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice((1, 2, 8, 100)))
    how = rng.randrange(5)
    if how == 0 and data:
        changed = bytearray(data)
        changed[at % len(data)] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if how == 1:
        return data[:at]
    if how == 2:
        return data[:at] + data[end:]
    if how == 3:
        return data[:end] + data[at:]
    other = files[rng.choice(sorted(files))]
    return data[:at] + other[rng.randrange(len(other) + 1) :]


def _json(data: bytes, rng: random.Random) -> bytes:
    """Put something else in one place of a JSON document."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return data
    at, parents = document, []
    while isinstance(at, (dict, list)) and at and (not parents or rng.random() < 0.7):
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        parents.append((at, key))
        at = at[key]
    if not parents:
        return data
    holder, key = parents[-1]
    if rng.random() < 0.3:
        del holder[key]
    else:
        holder[key] = rng.choice([None, True, -1, 2**40, 1.5, "", "x\ny", [], {}, [[]], {"a": 1}, float("nan")])
    return json.dumps(document).encode()


def structured(data: bytes, rng: random.Random) -> bytes:
    """One change to the fields of a protobuf."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
        for _ in range(20):
            if rng.choice(CHANGES)(model, rng):
                break
        return model.SerializeToString()
    except Exception:  # what an earlier change left can't be changed again
        return data


Change = Callable[[onnx.ModelProto, random.Random], bool]


def _node(model: onnx.ModelProto, rng: random.Random) -> onnx.NodeProto | None:
    return rng.choice(list(model.graph.node)) if model.graph.node else None


def _names(model: onnx.ModelProto) -> list[str]:
    made = [o for n in model.graph.node for o in n.output]
    return [*made, *(t.name for t in model.graph.initializer), *WORDS]


def _rewire(model: onnx.ModelProto, rng: random.Random) -> bool:
    node = _node(model, rng)
    ports = [p for p in (node.input, node.output) if p] if node is not None else []
    if not ports:
        return False
    port = rng.choice(ports)
    port[rng.randrange(len(port))] = rng.choice(_names(model))
    return True


def _arity(model: onnx.ModelProto, rng: random.Random) -> bool:
    node = _node(model, rng)
    if node is None:
        return False
    port = rng.choice((node.input, node.output))
    if port and rng.random() < 0.5:
        del port[rng.randrange(len(port))]
    else:
        port.append(rng.choice(_names(model)))
    return True


def _operator(model: onnx.ModelProto, rng: random.Random) -> bool:
    node = _node(model, rng)
    if node is None:
        return False
    operators = sorted({s.name for s in onnx.defs.get_all_schemas()})
    field = rng.choice(("op_type", "op_type", "op_type", "name", "domain"))
    setattr(node, field, rng.choice(operators) if field == "op_type" else rng.choice(WORDS))
    return True


def _list(model: onnx.ModelProto, rng: random.Random) -> bool:
    """Delete, repeat or move an entry of one of the lists of the graph."""
    graph = model.graph
    entries = rng.choice(
        (graph.node, graph.node, graph.initializer, graph.input, graph.output, graph.value_info, model.opset_import)
    )
    if not entries:
        return False
    kept, at = [type(e).FromString(e.SerializeToString()) for e in entries], rng.randrange(len(entries))
    entry = kept.pop(at)
    how = rng.randrange(3)
    if how:
        kept.insert(rng.randrange(len(kept) + 1), entry)
    if how == 2:
        kept.insert(at, entry)
    del entries[:]
    entries.extend(kept)
    return True


def _attribute(model: onnx.ModelProto, rng: random.Random) -> bool:
    nodes = [n for n in model.graph.node if n.attribute]
    if not nodes:
        return False
    attribute = rng.choice(list(rng.choice(nodes).attribute))
    how = rng.randrange(6)
    if how == 0:
        attribute.name = rng.choice(("axis", "perm", "to", "value", *WORDS))
    elif how == 1:
        attribute.type = rng.choice(onnx.AttributeProto.AttributeType.values())
    elif how == 2:
        attribute.i = rng.choice(NUMBERS)
    elif how == 3:
        attribute.ints.append(rng.choice(NUMBERS))
    elif how == 4 and attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(NUMBERS)
    else:
        attribute.f = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e38))
    return True


def _new_attribute(model: onnx.ModelProto, rng: random.Random) -> bool:
    """An attribute that the operator has, with another value."""
    node = _node(model, rng)
    if node is None or not onnx.defs.has(node.op_type):
        return False
    known = onnx.defs.get_schema(node.op_type).attributes
    if not known:
        return False
    name = rng.choice(sorted(known))
    value: Any = {"INT": rng.choice(NUMBERS), "INTS": [rng.choice(NUMBERS)] * rng.randrange(4), "FLOAT": 0.5}.get(
        known[name].type.name, "x"
    )
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)] if value != [] else kept)
    return True


def _tensor(model: onnx.ModelProto, rng: random.Random) -> bool:
    tensors = [*model.graph.initializer, *(a.t for n in model.graph.node for a in n.attribute if a.HasField("t"))]
    if not tensors:
        return False
    tensor = rng.choice(tensors)
    how = rng.randrange(7)
    if how == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(NUMBERS)
    elif how == 1:
        tensor.dims.append(rng.choice((0, 1, 2, 2**40)))
    elif how == 2:
        tensor.data_type = rng.choice([*TensorProto.DataType.values(), 99])
    elif how == 3:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    elif how == 4:
        values = bytearray(tensor.raw_data)
        for _ in range(min(8, len(values))):
            values[rng.randrange(len(values))] = rng.choice((0, 0x7F, 0x80, 0xFF))
        tensor.raw_data = bytes(values)
    elif how == 5:
        tensor.name = rng.choice(_names(model))
    else:
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key = rng.choice(("location", "offset", "length"))
        entry.value = rng.choice(("../x", "/etc/passwd", "w.bin", "config.json", "-1", "4", str(2**64), "é", "\0"))
    return True


def _external(model: onnx.ModelProto, rng: random.Random) -> bool:
    entries = [e for t in model.graph.initializer for e in t.external_data]
    if not entries:
        return False
    entry = rng.choice(entries)
    setattr(entry, *rng.choice((("key", rng.choice(WORDS)), ("value", rng.choice((*WORDS, "1", "-1", str(2**63)))))))
    return True


def _value(model: onnx.ModelProto, rng: random.Random) -> bool:
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    if not values:
        return False
    value = rng.choice(values)
    kind, how = value.type.tensor_type, rng.randrange(4)
    if how == 0:
        value.name = rng.choice(_names(model))
    elif how == 1:
        kind.elem_type = rng.choice([*TensorProto.DataType.values(), 99])
    elif how == 2 and kind.shape.dim:
        dim = rng.choice(list(kind.shape.dim))
        setattr(dim, *rng.choice((("dim_value", rng.choice(NUMBERS)), ("dim_param", rng.choice(WORDS)))))
    else:
        kind.shape.dim.add().dim_value = rng.choice(NUMBERS)
    return True


def _header(model: onnx.ModelProto, rng: random.Random) -> bool:
    if rng.random() < 0.3 or not model.opset_import:
        model.ir_version = rng.choice((0, 1, 3, 4, 8, 10, 13, 99, -1))
    else:
        entry = rng.choice(list(model.opset_import))
        setattr(
            entry,
            *rng.choice(
                (
                    ("version", rng.choice((0, -1, 1, 7, 13, 17, 18, 21, 22, 24, 25, 26, 99))),
                    ("domain", rng.choice(WORDS)),
                )
            ),
        )
    return True


CHANGES: tuple[Change, ...] = (
    _rewire, _rewire, _arity, _operator, _operator, _list, _attribute, _attribute, _new_attribute, _new_attribute, _tensor,
    _tensor, _external, _value, _header,
)  # fmt: skip


class Worker:
    """A process that opens one folder after the other. `check` says what was wrong with one, None if nothing was."""

    def __init__(self, folder: Path, *, flaw: str = "", limit: float = LIMIT) -> None:
        self.folder, self.flaw, self.limit = folder / "work", flaw, limit
        self.around = folder / "around.txt"
        self._process: Any = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Worker:
        self.around.write_text("what lies beside")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, self.flaw), daemon=True)
        self._process.start()
        other.close()
        assert self._pipe.poll(120) and self._pipe.recv() == "ready"

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def check(self, files: dict[str, bytes], number: int) -> str | None:
        if self._process is None:
            self._start()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for name, data in files.items():
            (self.folder / name).write_bytes(data)
        assert self._pipe is not None
        self._pipe.send((str(self.folder), number))
        try:
            if not self._pipe.poll(self.limit):
                self._stop()
                return f"hang: longer than {self.limit:.0f} seconds"
            problem = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            self._stop()
            return f"crash: the process ended with {code}"
        found = {p.name: p.read_bytes() for p in self.folder.iterdir()}
        beside = {p.name for p in self.folder.parent.iterdir()}
        if problem is None and (found != files or beside != {"work", "around.txt"}):
            problem = f"write: the folder is not as it was ({sorted(beside)}, {sorted(found)})"
        return problem if problem is None or isinstance(problem, str) else str(problem)


def serve(pipe: Connection, flaw: str) -> None:
    """The worker's side: opens what it is told to, and says what it saw."""
    import resource

    faulthandler.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    put_in(flaw)
    from llmlab.graph import export, optimize  # noqa: F401 (before the limit, which they would count against)

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    pipe.send("ready")
    while True:
        folder, number = pipe.recv()
        if flaw == "crash" and number % 100 == 0:
            os.kill(os.getpid(), signal.SIGSEGV)
        pipe.send(judge(Path(folder)))


def judge(folder: Path) -> str | None:
    """Open and optimize what lies in `folder`; None unless something happens that must not."""
    from llmlab.errors import LlmlabError
    from llmlab.graph.export import export
    from llmlab.graph.graph import Graph
    from llmlab.graph.optimize import optimize

    try:
        graph = export(folder / "model.onnx") if (folder / "model.onnx").exists() else Graph.load(folder)
        if graph.kind == "plain":
            optimize(graph)
    except LlmlabError as problem:
        return None if "\n" not in str(problem) else f"two lines: {problem}"
    except BaseException as problem:
        trace = sys.exc_info()[2]
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        at = "" if trace is None else f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        return f"raises {type(problem).__name__}{at}: {' '.join(str(problem).split())[:200]}"
    return None


FLAWS = {
    "unchecked": "case .*: (raises|crash|hang)",
    "crash": "case .*: crash: the process ended with -11",
    "hang": "case .*: hang: longer than",
    "write": "case .*: write: the folder is not as it was",
    "two lines": "case .*: two lines",
}
"""Flaws that `put_in` puts in, and what the search must say of them."""


def put_in(flaw: str) -> None:
    """A flaw for the search to find, in this process."""
    if flaw in ("", "crash"):
        return
    import time

    from llmlab.errors import GraphError
    from llmlab.graph.sources import from_onnx
    from llmlab.graph.store import storage

    original = from_onnx.check_model

    def flawed(model: onnx.ModelProto, where: Path, **options: Any) -> None:
        if flaw == "hang":
            time.sleep(3600)
        if flaw == "write":
            (Path(where).parent.parent / "written").write_text("x")
        if flaw == "two lines":
            raise GraphError("one\ntwo")
        if flaw != "unchecked":
            original(model, where, **options)

    from_onnx.check_model = storage.check_model = flawed
