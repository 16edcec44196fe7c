"""PagedAttention inside a TensorRT engine: an IPluginV3 in Python that updates the KV pool in place.

Needs a TensorRT with Python plugins and aliased plugin I/O: tensorrt ≥ 10.3, or tensorrt-rtx. The ONNX parser finds the
plugin by the node's domain. Its kernels are the ones that piecewise hosting launches (`llmlab/kernels/attention.py`), on
the stream that TensorRT hands to `enqueue`; how they are cut into programs depends on shapes alone, so an execution may be
captured in a CUDA graph.

Engines with it are built and looked into for every family, and its launches are run by Triton's interpreter; no GPU that
runs such an engine was at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import cache, wraps
from types import ModuleType
from typing import Any

import numpy as np

from llmlab.cuda import Device
from llmlab.errors import EngineError, LlmlabError
from llmlab.kernels.binaries import KernelSet
from llmlab.tensorrt.attention_launch import AttentionLaunch, workspace_bytes
from llmlab.tensorrt.attention_node import AttentionNode

DOMAIN, NAME, VERSION = "llmlab", "PagedAttention", "1"

_TYPES = {
    "HALF": "float16",
    "BF16": "bfloat16",
    "FLOAT": "float32",
    "INT8": "int8",
    "FP8": "float8_e4m3fn",
    "INT32": "int32",
    "INT64": "int64",
}


class PluginHost:
    """The plugin as one TensorRT module knows it: registered once a process, with what its layers launch and what failed."""

    def __init__(self, trt: ModuleType) -> None:
        self.failures: list[BaseException] = []
        self.kernels: tuple[KernelSet, Device] | None = None
        self.creator = _creator(trt, self)
        if not trt.get_plugin_registry().register_creator(self.creator, DOMAIN):
            raise EngineError(f"{trt.__name__} {trt.__version__} did not take the plugin {DOMAIN}::{NAME}")

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Parse, build, deserialise or execute in here: the first exception that a callback met is raised at the end.

        TensorRT's bindings print a callback's exception; some of them then go on as if nothing had happened (a workspace
        of no bytes, an output that isn't in place), others fail with a message that doesn't say why.
        """
        self.failures.clear()
        try:
            yield
        finally:
            if self.failures:
                first = self.failures[0]
                self.failures.clear()
                if isinstance(first, LlmlabError | KeyboardInterrupt):
                    raise first
                raise EngineError(f"the PagedAttention plugin failed: {type(first).__name__}: {first}") from first

    def recorded(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A callback whose exception is kept for `reporting` before TensorRT's bindings get it."""

        @wraps(method)
        def call(*arguments: Any) -> Any:
            try:
                return method(*arguments)
            except BaseException as error:
                self.failures.append(error)
                raise

        return call

    @contextmanager
    def launching(self, kernels: KernelSet, device: Device) -> Iterator[None]:
        """Deserialise in here: the engine's layers launch from `kernels`, on `device`."""
        self.kernels = kernels, device
        try:
            yield
        finally:
            self.kernels = None


@cache
def plugin_host(trt: ModuleType) -> PluginHost:
    """The host of `trt` (the module `tensorrt` or `tensorrt_rtx`), which registers the plugin when first asked for."""
    return PluginHost(trt)


def _creator(trt: Any, host: PluginHost) -> Any:
    """An instance of the plugin's creator; its classes derive from those of the module `trt`."""
    plugin = _plugin_class(trt, host)

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = NAME, DOMAIN, VERSION
            self.field_names, self._kept = plugin_fields(trt, dict.fromkeys((f.name for f in fields(AttentionNode)), 0))

        @host.recorded
        def create_plugin(self, name: str, given: Any, phase: Any) -> Any:
            attributes = {field.name: np.asarray(field.data).reshape(-1)[0] for field in given}
            running = phase == trt.TensorRTPhase.RUNTIME
            if running and host.kernels is None:
                raise EngineError("an engine with PagedAttention inside needs its kernels: open it through llmlab.LLM")
            return plugin(AttentionNode.from_attributes(attributes), host.kernels if running else None)

    return Creator()


def _names(types: Iterable[Any]) -> list[str]:
    """TensorRT's types by NumPy's names."""
    return [_TYPES.get(t.name, t.name) for t in types]


def plugin_fields(trt: Any, values: Mapping[str, float]) -> tuple[Any, list[Any]]:
    """A PluginFieldCollection of `values`, and what must live as long as it does: the collection holds bare pointers."""
    arrays, made = [], []
    for field in fields(AttentionNode):
        wide = field.type == "float"
        arrays.append(np.array([values[field.name]], np.float32 if wide else np.int32))
        kind = trt.PluginFieldType.FLOAT32 if wide else trt.PluginFieldType.INT32
        made.append(trt.PluginField(field.name, arrays[-1], kind))
    return trt.PluginFieldCollection(made), [*arrays, *made]


def _plugin_class(trt: Any, host: PluginHost) -> Any:
    recorded = host.recorded

    class PagedAttentionPlugin(
        trt.IPluginV3,
        trt.IPluginV3OneCore,
        trt.IPluginV3OneBuildV2,
        trt.IPluginV3OneRuntime,
    ):
        """One layer. While an engine is built it launches nothing: TensorRT's inputs hold no step then."""

        def __init__(self, node: AttentionNode, kernels: tuple[KernelSet, Device] | None) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.plugin_name, self.plugin_namespace, self.plugin_version = NAME, DOMAIN, VERSION
            self.num_outputs = 2
            self._node, self._kernels = node, kernels
            self._launch: AttentionLaunch | None = None
            self._fields, self._kept = plugin_fields(trt, asdict(node))

        # An exception in these two would end the process: they hold nothing that can raise one.
        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return PagedAttentionPlugin(self._node, self._kernels)

        def get_fields_to_serialize(self) -> Any:
            return self._fields

        @recorded
        def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
            self._node.check_types(_names(types))
            return [types[0], types[self._node.pool]]

        @recorded
        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Any, exprs: Any) -> list[Any]:
            out = trt.DimsExprs([inputs[0][0], exprs.constant(self._node.width)])
            return [out, trt.DimsExprs(inputs[self._node.pool])]

        def get_aliased_input(self, output: int) -> int:
            return self._node.pool if output == 1 else -1

        @recorded
        def supports_format_combination(self, at: int, tensors: Sequence[Any], inputs: int) -> bool:
            names = (*self._node.inputs, "out", "pool")
            desc = tensors[at].desc
            dtype, rows = _names((desc.type, tensors[0].desc.type))
            return desc.format == trt.TensorFormat.LINEAR and self._node.takes(names[at], dtype, rows)

        @recorded
        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            self._node.check_shapes([tuple(t.desc.dims) for t in inputs])

        @recorded
        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            largest = {name: tuple(t.max) for name, t in zip(self._node.inputs, inputs, strict=True)}
            return workspace_bytes(self._node, largest["position_ids"][0], largest["kv_len"][0])

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            pass

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        @recorded
        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            self._loaded(inputs)  # not in `enqueue` first: that may be captured, and a capture loads nothing

        def _loaded(self, inputs: Sequence[Any]) -> AttentionLaunch | None:
            """The layer's kernels on the GPU; None in a plugin that is being built."""
            if self._kernels is not None and self._launch is None:
                self._launch = AttentionLaunch(self._node, *self._kernels, _names(t.type for t in inputs))
            return self._launch

        @recorded
        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            if (launch := self._loaded(input_desc)) is not None:
                launch.enqueue([tuple(t.dims) for t in input_desc], inputs, outputs[0], workspace, stream)

    return PagedAttentionPlugin
