"""Whether an ONNX file says something that can be believed: structure, names, operators, sizes. Nothing is executed.

Everything behind it (the surgeon, shape inference, ONNX Runtime) may then rely on a graph that is acyclic, complete and
of the declared sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

from llmlab.errors import GraphError
from llmlab.files import COUNT_LIMIT, DIM_LIMIT, NAME_LIMIT, RANK_LIMIT
from llmlab.graph.store.signatures import Signature, standard_signature
from llmlab.graph.store.tensors import misfit

STANDARD = ("", "ai.onnx")
_OWN_ATTRIBUTE = "llmlab_"  # what a pass leaves on a standard node for the next one
_VALUE_FIELDS = {
    AttributeProto.FLOAT: "f",
    AttributeProto.INT: "i",
    AttributeProto.STRING: "s",
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.FLOATS: "floats",
    AttributeProto.INTS: "ints",
    AttributeProto.STRINGS: "strings",
    AttributeProto.TENSORS: "tensors",
    AttributeProto.GRAPHS: "graphs",
}


def check_model(model: onnx.ModelProto, where: Path, *, domains: Collection[str] | None) -> None:
    """Raise GraphError, one line, at the first thing in `model` that is malformed, absurd or unknown.

    domains: the operator sets, besides the standard one, whose operators are accepted; None: any.
    """
    try:
        _Checker(model, where, domains).run()
    except UnicodeError as problem:
        raise GraphError(f"{where}: malformed (text that is not UTF-8): altered, export it again") from problem


class _Checker:
    def __init__(self, model: onnx.ModelProto, where: Path, domains: Collection[str] | None) -> None:
        self.model, self.where, self.domains = model, where, domains
        self.functions = {(f.domain, f.name): f for f in model.functions}
        self.opsets: dict[str, int] = {}

    def fail(self, what: str) -> GraphError:
        return GraphError(f"{self.where}: {what}")

    def run(self) -> None:
        model = self.model
        if not model.HasField("graph") and not model.ir_version:
            raise self.fail("not an ONNX model: there is no graph in it")
        if not 3 <= model.ir_version <= onnx.IR_VERSION:
            raise self.fail(f"ir_version {model.ir_version}; this llmlab reads 3 to {onnx.IR_VERSION}")
        for entry in model.opset_import:
            domain = "" if entry.domain in STANDARD else entry.domain
            if self.opsets.setdefault(domain, entry.version) != entry.version:
                raise self.fail(f"two versions of the operator set {domain!r}: altered, export it again")
        newest = onnx.defs.onnx_opset_version()
        if not 1 <= self.opsets.get("", 0) <= newest:
            found = self.opsets.get("", "none")
            raise self.fail(
                f"operator set (opset) {found}; this llmlab reads up to {newest}: export with opset 18 to 23"
            )
        if len(self.functions) != len(model.functions):
            raise self.fail("two functions of one name: altered, export it again")
        if model.graph.sparse_initializer:
            raise self.fail("sparse weights; store them dense")
        self._count()
        self._functions()
        self._values([*model.graph.input, *model.graph.output, *model.graph.value_info])
        self._graph(model.graph, set(), "the graph")

    def _count(self) -> None:
        """No more nodes, functions written out, than anyone has use for; and no function inside itself."""
        sizes: dict[tuple[str, str], int] = {}

        def total(nodes: Iterable[NodeProto], open_: tuple[tuple[str, str], ...]) -> int:
            count = 0
            for node in nodes:
                key = (node.domain, node.op_type)
                if key in self.functions and key in open_:
                    raise self.fail(f"function {key[1]!r} calls itself")
                if key in self.functions and key not in sizes:
                    if len(open_) > 64:
                        raise self.fail("functions call each other more than 64 deep")
                    sizes[key] = total(self.functions[key].node, (*open_, key))
                count += sizes.get(key, 1)
                for graph in _subgraphs(node):
                    count += total(graph.node, open_)
                if count > COUNT_LIMIT:
                    raise self.fail(f"more than {COUNT_LIMIT} nodes")
            return count

        total(self.model.graph.node, ())
        for key, function in self.functions.items():
            total(function.node, (key,))
        if len(self.model.graph.initializer) > COUNT_LIMIT:
            raise self.fail(f"more than {COUNT_LIMIT} initializers")

    def _functions(self) -> None:
        for function in self.model.functions:
            outer, self.opsets = (
                self.opsets,
                {
                    **self.opsets,
                    **{("" if o.domain in STANDARD else o.domain): o.version for o in function.opset_import},
                },
            )
            what = f"function {function.name!r}"
            self._name(function.name, "a function")
            known = set(function.input)
            if len(known) != len(function.input):
                raise self.fail(f"{what} has two inputs of one name")
            made = self._nodes(function.node, known, what)
            if missing := [n for n in function.output if n not in known | made]:
                raise self.fail(f"{what}: nothing makes its output {missing[0]!r}")
            self.opsets = outer

    def _graph(self, graph: GraphProto, outer: set[str], what: str) -> None:
        inputs = [v.name for v in graph.input]
        weights = [t.name for t in graph.initializer]
        for kind, names in (("inputs", inputs), ("initializers", weights), ("outputs", [v.name for v in graph.output])):
            for name in names:
                self._name(name, f"one of the {kind}", needed=True)
            if (twice := _duplicate(names)) is not None:
                raise self.fail(f"{what} has two {kind} named {twice!r}: altered, export it again")
        for tensor in graph.initializer:
            self._tensor(tensor, f"initializer {tensor.name!r}")
        known = {*outer, *inputs, *weights}
        made = self._nodes(graph.node, known, what)
        if not graph.output:
            raise self.fail(f"{what} has no outputs")
        if missing := [v.name for v in graph.output if v.name not in known | made]:
            raise self.fail(f"nothing makes the output {missing[0]!r} of {what}: altered, export it again")

    def _nodes(self, nodes: Iterable[NodeProto], known: set[str], what: str) -> set[str]:
        """Check nodes one by one and the order that they are in; returns the names that they make."""
        nodes = list(nodes)
        made: set[str] = set()
        for node in nodes:
            label = f"node {(node.name or next(iter(node.output), ''))!r} ({node.op_type})"
            self._node(node, label)
            for name in filter(None, node.output):
                if name in made or name in known:
                    raise self.fail(f"{label} makes {name!r}, which there is already: altered, export it again")
                made.add(name)
        so_far = set(known)
        for node in nodes:
            for name in filter(None, node.input):
                if name not in so_far:
                    late = "comes before the node that makes" if name in made else "reads what nothing makes:"
                    hint = " (a cycle, or nodes out of order)" if name in made else ""
                    raise self.fail(
                        f"node {(node.name or node.output[0])!r} ({node.op_type}) {late} {name!r}{hint}: altered, export it again"
                    )
            for graph in _subgraphs(node):
                self._values([*graph.input, *graph.output, *graph.value_info])
                self._graph(graph, so_far, f"the graph inside {node.name!r}")
            so_far.update(filter(None, node.output))
        return made

    def _node(self, node: NodeProto, label: str) -> None:
        for name in (node.name, node.op_type, node.domain, *node.input, *node.output):
            self._name(name, "a node")
        if not any(node.output):
            raise self.fail(f"{label} has no outputs: altered, export it again")
        signature = self._signature(node, label)
        attributes = [a.name for a in node.attribute]
        if (twice := _duplicate(attributes)) is not None:
            raise self.fail(f"{label} has two attributes {twice!r}: altered, export it again")
        for attribute in node.attribute:
            self._attribute(attribute, label, signature)
        if signature is None:
            return
        for side, given, (least, most) in (
            ("inputs", node.input, signature.inputs),
            ("outputs", node.output, signature.outputs),
        ):
            if not least <= len(given) <= most:
                wanted = f"{least}" if least == most else f"{least} to {most}" if most < 1 << 30 else f"{least} or more"
                raise self.fail(f"{label} has {len(given)} {side}, expected {wanted}")
        if not all(list(node.input)[: signature.inputs[0]]):
            raise self.fail(f"{label} leaves out one of its first {signature.inputs[0]} inputs, which it needs")
        if missing := [n for n in signature.required if n not in attributes]:
            raise self.fail(f"{label} has no attribute {missing[0]!r}, which it needs")

    def _signature(self, node: NodeProto, label: str) -> Signature | None:
        domain = "" if node.domain in STANDARD else node.domain
        if (function := self.functions.get((node.domain, node.op_type))) is not None:
            given = [*function.attribute, *(a.name for a in function.attribute_proto)]
            return Signature(
                (0, len(function.input)), (0, len(function.output)), dict.fromkeys(given, 0), tuple(function.attribute)
            )
        if domain and self.domains is not None and domain not in self.domains:
            raise self.fail(
                f"{label} is of the operator set {domain!r}, which llmlab doesn't know, and has no function that defines it"
            )
        version = self.opsets.get(domain)
        if version is None:
            raise self.fail(f"{label}: no version of the operator set {domain!r} is declared")
        if domain:
            return None
        found = standard_signature(node.op_type, version)
        if found is None:
            raise self.fail(f"{label}: opset {version} has no operator of that name")
        return found

    def _attribute(self, attribute: AttributeProto, label: str, signature: Signature | None) -> None:
        self._name(attribute.name, label, needed=True)
        field = _VALUE_FIELDS.get(attribute.type)
        if field is None:
            raise self.fail(f"{label}: attribute {attribute.name!r} has a type that can't be used ({attribute.type})")
        if attribute.ref_attr_name:
            return
        if signature is not None and not attribute.name.startswith(_OWN_ATTRIBUTE):
            wanted = signature.attributes.get(attribute.name)
            if wanted is None:
                raise self.fail(f"{label} has an attribute {attribute.name!r}, which the operator doesn't know")
            if wanted not in (0, attribute.type):  # 0: a function's, which has no declared type
                names = AttributeProto.AttributeType
                raise self.fail(
                    f"{label}: attribute {attribute.name!r} is of type {names.Name(attribute.type)}, expected {names.Name(wanted)}"
                )
        if attribute.type in (AttributeProto.TENSOR, AttributeProto.GRAPH) and not attribute.HasField(field):
            raise self.fail(f"{label}: attribute {attribute.name!r} is empty")
        for tensor in [attribute.t, *attribute.tensors] if field in ("t", "tensors") else []:
            if tensor.data_location == TensorProto.EXTERNAL:
                raise self.fail(
                    f"{tensor.name!r} lies in another file and is no initializer of the graph: altered, export it again"
                )
            self._tensor(tensor, f"{label}: attribute {attribute.name!r}")
        if field in ("s", "strings"):
            for text in (attribute.s, *attribute.strings):
                if len(text) > NAME_LIMIT:
                    raise self.fail(f"{label}: attribute {attribute.name!r} is a text of {len(text)} bytes")
                text.decode()

    def _tensor(self, tensor: TensorProto, label: str) -> None:
        for entry in tensor.external_data:
            self._name(entry.key, label)
            self._name(entry.value, label)
        if (problem := misfit(tensor)) is not None:
            raise self.fail(f"{label} {problem}")

    def _values(self, values: Iterable[onnx.ValueInfoProto]) -> None:
        """Declared types and shapes of inputs, outputs and the values between."""
        for value in values:
            self._name(value.name, "a value")
            declared = value.type
            while declared.WhichOneof("value") == "sequence_type":
                declared = declared.sequence_type.elem_type
            if (kind := declared.WhichOneof("value")) not in (None, "tensor_type"):
                raise self.fail(f"{value.name!r} is no tensor ({kind.removesuffix('_type')}): nothing here can use it")
            dims = value.type.tensor_type.shape.dim
            if len(dims) > RANK_LIMIT or any(not 0 <= d.dim_value <= DIM_LIMIT for d in dims):
                raise self.fail(f"{value.name!r} has an absurd shape {[d.dim_value for d in dims][:RANK_LIMIT]}")
            for dim in dims:
                self._name(dim.dim_param, f"a dimension of {value.name!r}")
            if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type not in _KNOWN_TYPES:
                raise self.fail(f"{value.name!r} has type {value.type.tensor_type.elem_type}, which ONNX doesn't know")

    def _name(self, name: str, what: str, *, needed: bool = False) -> None:
        if not isinstance(name, str):  # protobuf gives bytes for what is not UTF-8
            raise self.fail(f"a name is not UTF-8 ({name[:40]!r}): altered, export it again")
        if len(name) > NAME_LIMIT:
            raise self.fail(f"a name of {len(name)} characters ({name[:20]!r}…); at most {NAME_LIMIT} are read")
        if needed and not name:
            raise self.fail(f"{what} has no name: altered, export it again")
        if not name.isprintable():
            raise self.fail(f"a name holds control characters ({name[:40]!r}): altered, export it again")


_KNOWN_TYPES = frozenset(TensorProto.DataType.values())


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _duplicate(names: Iterable[str]) -> str | None:
    return next((n for n, count in Counter(names).items() if count > 1), None)
