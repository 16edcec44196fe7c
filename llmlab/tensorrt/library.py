"""Which TensorRT is there and what it can do. Nothing else in llmlab asks for a version.

library = resolve("tensorrt")        # 8.6 … 11, or "tensorrt-rtx"
engine = library.load(plan)
context = library.context(engine)
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import ModuleType
from typing import Any, Literal, get_args

from llmlab.errors import EngineError, InputError, MissingDependencyError
from llmlab.tensorrt.gpu import Gpu, visible_gpu
from llmlab.tensorrt.installed import Capability, Kind, dotted, find_tensorrt
from llmlab.tensorrt.log import Heard, make_logger

_OTHER_VERSION = re.compile(
    r"serialization version|magic ?tag|older plan|version tag|stdVersion|versions? compatib", re.I
)
_OTHER_GPU = re.compile(
    r"compute capability|(?:different|incompatible|another) (?:model )?device|GPU architecture", re.I
)


@dataclass(frozen=True)
class Library:
    """One TensorRT: its module, and the answers to every question whose answer depends on its version."""

    kind: Kind
    module: ModuleType
    version: tuple[int, ...]
    logger: Any = field(repr=False)
    heard: Heard = field(repr=False)
    """What the logger heard, for messages."""

    def __str__(self) -> str:
        title = "TensorRT-RTX" if self.rtx else "TensorRT"
        return f"{title} {'.'.join(map(str, self.version))}"

    # What it can do.

    @property
    def rtx(self) -> bool:
        return self.kind == "tensorrt-rtx"

    @property
    def strongly_typed(self) -> bool:
        """Whether the types in the ONNX file decide. Else the file is float32 and TensorRT chooses (weak typing)."""
        return self.rtx or self.version >= (10,)

    @property
    def opset(self) -> Literal[17, 23]:
        """The dialect that its ONNX parser reads: 23 has RMSNormalization, RotaryEmbedding and int4."""
        return 23 if self.native_attention else 17

    @property
    def python_plugins(self) -> bool:
        """Whether a plugin written in Python can update the KV pool in place."""
        return hasattr(self.module, "IPluginV3") and hasattr(self._features, "ALIASED_PLUGIN_IO_10_03")

    @property
    def native_attention(self) -> bool:
        """Whether it has attention, rotary embedding and a KV cache update as operators of its own."""
        return hasattr(self.module.LayerType, "KV_CACHE_UPDATE")

    @property
    def progress_monitor(self) -> bool:
        """Whether a build says how far it is, and can be stopped in the middle."""
        return hasattr(self.module, "IProgressMonitor")

    @property
    def timing_cache(self) -> bool:
        """Whether measuring kernels is part of a build. RTX compiles them where they run."""
        return not self.rtx

    @property
    def timing_cache_bytes(self) -> bool:
        """Whether a timing cache can be written and read again. That of 8.6 is refused when it is read."""
        return self.timing_cache and self.version >= (9,)

    @property
    def needs_gpu(self) -> bool:
        """Whether a build runs on the GPU that the engine is for."""
        return not self.rtx

    @property
    def foreign_tactics(self) -> bool:
        """Whether it would take kernels from cuBLAS and cuDNN, which need not be there."""
        return self.version < (10,) and not self.rtx

    @property
    def precisions(self) -> tuple[str, ...]:
        known = ("float32", "float16", "bfloat16", "int8", "int4", "float8")
        types = {"float16": "HALF", "float32": "FLOAT", "bfloat16": "BF16", "int8": "INT8", "int4": "INT4"}
        has = {name: hasattr(self.module.DataType, member) for name, member in types.items()}
        has["float8"] = self.strongly_typed and hasattr(self.module.DataType, "FP8")
        return tuple(name for name in known if has[name])

    @property
    def hostings(self) -> tuple[Literal["plugin", "piecewise", "native"], ...]:
        """How PagedAttention can be hosted, the best one first."""
        has = {"plugin": self.python_plugins, "piecewise": True, "native": self.native_attention}
        return tuple(name for name, there in has.items() if there)  # type: ignore[misc]

    def hosting(self, wanted: str | None) -> Literal["plugin", "piecewise", "native"]:
        """`wanted`, or the best one. Raises InputError where this TensorRT hasn't got it."""
        if wanted is None:
            return self.hostings[0]
        for name in self.hostings:
            if name == wanted:
                return name
        raise InputError(
            f"attention={wanted!r} needs a newer TensorRT than {self}; available: {', '.join(self.hostings)}"
        )

    @cached_property
    def compute_capabilities(self) -> frozenset[Capability]:
        """GPUs that it can build for without having them; empty where it builds for the GPU in the machine."""
        if not self.rtx:
            return frozenset()
        names = (re.fullmatch(r"SM(\d+)(\d)", name) for name in self.module.ComputeCapability.__members__)
        return frozenset((int(m[1]), int(m[2])) for m in names if m)

    def check_capabilities(self, wanted: Iterable[Capability]) -> tuple[Capability, ...]:
        """The GPUs to build for. Raises InputError for those that this TensorRT can't build for here."""
        asked = tuple(dict.fromkeys(wanted))
        gpu = visible_gpu()
        if self.rtx:
            here = () if gpu is None else (gpu.compute_capability,)
            if not (asked or here):
                raise InputError(
                    f"compute_capabilities is empty and no GPU is visible: name the GPUs to build for, of {dotted(self.compute_capabilities)}"
                )
            for capability in asked or here:
                if capability not in self.compute_capabilities:
                    raise InputError(
                        f"{self} doesn't build for compute capability {dotted([capability])}, only for {dotted(self.compute_capabilities)}: use target='tensorrt' on that GPU"
                    )
            return asked or here
        if gpu is not None:
            for capability in asked:
                if capability != gpu.compute_capability and min(capability, gpu.compute_capability) < (8, 0):
                    raise InputError(
                        f"{self} builds on the GPU itself, here a {gpu.name} of compute capability {dotted([gpu.compute_capability])}, not for {dotted([capability])}: build there"
                    )
        return asked

    def hardware_compatibility(self, wanted: Iterable[Capability]) -> Any:
        """The compatibility level that an engine for `wanted` needs beside this machine's GPU, or None."""
        gpu = visible_gpu()
        if self.rtx or gpu is None or set(wanted) <= {gpu.compute_capability}:
            return None
        return self.module.HardwareCompatibilityLevel.AMPERE_PLUS

    # What differs at run time.

    @cached_property
    def _runtime(self) -> Any:
        self.require_gpu()
        return self.module.Runtime(self.logger)

    def require_gpu(self) -> Gpu:
        """The GPU. Raises EngineError in one line where there is none, or its driver is too old: 8.6 would crash."""
        gpu = visible_gpu()
        if gpu is None:
            raise EngineError(f"{self} finds no NVIDIA GPU here: go to a machine where nvidia-smi lists one")
        needed = 13 if self.rtx or self.version >= (11,) else 12
        if gpu.cuda[0] < needed:
            self.heard.clear()
            try:  # made for another CUDA, perhaps: a builder can be refused, a runtime crashes
                self.module.Builder(self.logger)
            except TypeError as problem:
                raise EngineError(_old_driver(self, gpu)) from problem
        return gpu

    def load(self, plan: Any, where: str = "the plan") -> Any:
        """The engine in `plan` (bytes). Raises EngineError in one line where it can't be loaded here."""
        runtime = self._runtime
        self.heard.clear()
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(f"{where}: {self._refusal()}")
        return engine

    def _refusal(self) -> str:
        said, gpu = self.heard.text, visible_gpu()
        here = f"this GPU ({gpu.name}, {dotted([gpu.compute_capability])})" if gpu else "this machine"
        if gpu and "driver version is insufficient" in said:
            return _old_driver(self, gpu)
        if self.heard.out_of_memory:
            return f"too large for the free memory of {here}: free some, or lower max_batch or max_tokens_per_step ({said})"
        if _OTHER_VERSION.search(said):
            return f"built by another version of TensorRT than {self}, or altered: build the engine again ({said})"
        if _OTHER_GPU.search(said):
            return f"built for another GPU than {here}: build the engine for it ({said})"
        return f"{self} can't load it: damaged or altered, build the engine again ({said or 'no reason given'})"

    def check_built_by(self, built_by: str, where: str) -> None:
        """Raises EngineError where `built_by`, the `str` of a library, isn't this one: plans fit one version alone."""
        if built_by != str(self):
            raise EngineError(
                f"{where}: built by {built_by}, here is {self}: build the engine again, or install that one"
            )

    def context(self, engine: Any) -> Any:
        """An execution context that has no memory of its own: give it some with `set_memory` before it runs."""
        self.heard.clear()
        strategies = getattr(self.module, "ExecutionContextAllocationStrategy", None)
        if strategies is None:
            context = engine.create_execution_context_without_device_memory()
        else:
            context = engine.create_execution_context(strategies.USER_MANAGED)
        if context is None:
            raise EngineError(f"no execution context: {self._refusal()}")
        return context

    def memory(self, engine: Any, profile: int) -> int:
        """Bytes of device memory that a context needs to run `profile`."""
        for name in ("get_device_memory_size_for_profile_v2", "get_device_memory_size_for_profile"):
            if hasattr(engine, name):
                return int(getattr(engine, name)(profile))
        return int(engine.device_memory_size)

    def set_memory(self, context: Any, pointer: int, nbytes: int) -> None:
        """Let `context` use `nbytes` of device memory at `pointer`, aligned to 256 bytes."""
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(pointer, nbytes)
        else:
            context.device_memory = pointer

    def aliased(self, engine: Any) -> dict[str, str]:
        """The outputs of an engine that are written into an input's memory, and the input of each."""
        if not hasattr(engine, "get_aliased_input_tensor"):
            return {}
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        outputs = [n for n in names if engine.get_tensor_mode(n) == self.module.TensorIOMode.OUTPUT]
        found = {name: engine.get_aliased_input_tensor(name) for name in outputs}
        return {output: source for output, source in found.items() if source}

    @property
    def _features(self) -> Any:
        return self.module.PreviewFeature

    def polygraphy(self) -> ModuleType:
        """polygraphy's TensorRT loaders, set up for this library and its logger. One kind a process."""
        try:
            config = importlib.import_module("polygraphy.config")
        except ImportError as error:
            raise MissingDependencyError(
                f"polygraphy is needed to build engines and can't be imported ({error}): pip install 'llmlab[{self.kind}]'"
            ) from error
        if "polygraphy.backend.trt" not in sys.modules:  # it asks once, when it is imported
            vars(config)["USE_TENSORRT_RTX"] = self.rtx
        elif vars(config)["USE_TENSORRT_RTX"] != self.rtx:
            raise InputError(
                f"polygraphy already serves another TensorRT in this process: build for {self.kind!r} in a new one"
            )
        loaders = importlib.import_module("polygraphy.backend.trt")
        vars(importlib.import_module("polygraphy.backend.trt.util"))["TRT_LOGGER"] = self.logger
        return loaders


@cache
def resolve(kind: Kind) -> Library:
    """The TensorRT that is installed. Raises InputError for an unknown kind, MissingDependencyError where there is none."""
    if kind not in get_args(Kind):
        raise InputError(f"{kind!r} is no kind of TensorRT; available: {', '.join(get_args(Kind))}")
    module, version = find_tensorrt(kind)
    logger, heard = make_logger(module)
    return Library(kind, module, version, logger, heard)


def _old_driver(library: Library, gpu: Gpu) -> str:
    runs = ".".join(map(str, gpu.cuda))
    return (
        f"the NVIDIA driver of this {gpu.name} runs CUDA {runs} at most, {library} needs a newer one: update the driver"
    )
