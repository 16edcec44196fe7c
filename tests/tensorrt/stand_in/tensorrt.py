"""A stand-in for the Python bindings of TensorRT 8.6.1: what they have, and nothing that later ones have.

It parses real ONNX files into a network of named layers, writes down what is called, and "builds" a plan that says what it was
asked for. `fail` makes a step fail the way 8.6 does: by None, and a message to the logger.
"""

from __future__ import annotations

import enum
import json
import time
from typing import Any

import onnx

__version__ = "8.6.1"
calls: list[tuple[str, Any]] = []
fail: dict[str, str] = {}
build_seconds = 0.0


def said(logger: Any, message: str) -> None:
    logger.log(ILogger.Severity.ERROR, message)


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4


class Logger(ILogger):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = ILogger.Severity


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    FP8 = 6


float32, float16, int8, int32 = DataType.FLOAT, DataType.HALF, DataType.INT8, DataType.INT32

_names = "FP16 INT8 DEBUG GPU_FALLBACK STRICT_TYPES REFIT DISABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS SAFETY_SCOPE OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS DIRECT_IO REJECT_EMPTY_ALGORITHMS ENABLE_TACTIC_HEURISTIC VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME FP8"
BuilderFlag = enum.IntEnum("BuilderFlag", _names, start=0)
PreviewFeature = enum.IntEnum(
    "PreviewFeature",
    "FASTER_DYNAMIC_SHAPES_0805 DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805 PROFILE_SHARING_0806",
    start=0,
)
NetworkDefinitionCreationFlag = enum.IntEnum(
    "NetworkDefinitionCreationFlag", "EXPLICIT_BATCH EXPLICIT_PRECISION", start=0
)
TacticSource = enum.IntEnum("TacticSource", "CUBLAS CUBLAS_LT CUDNN EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS", start=0)
MemoryPoolType = enum.IntEnum(
    "MemoryPoolType", "WORKSPACE DLA_MANAGED_SRAM DLA_LOCAL_DRAM DLA_GLOBAL_DRAM TACTIC_DRAM", start=0
)
ProfilingVerbosity = enum.IntEnum("ProfilingVerbosity", "LAYER_NAMES_ONLY DETAILED NONE", start=0)
HardwareCompatibilityLevel = enum.IntEnum("HardwareCompatibilityLevel", "NONE AMPERE_PLUS", start=0)
DeviceType = enum.IntEnum("DeviceType", "GPU DLA", start=0)
EngineCapability = enum.IntEnum("EngineCapability", "STANDARD SAFETY DLA_STANDALONE", start=0)
QuantizationFlag = enum.IntEnum("QuantizationFlag", "CALIBRATE_BEFORE_FUSION", start=0)
TensorIOMode = enum.IntEnum("TensorIOMode", "NONE INPUT OUTPUT", start=0)
LayerInformationFormat = enum.IntEnum("LayerInformationFormat", "ONELINE JSON", start=0)
LayerType = enum.IntEnum(
    "LayerType", "ELEMENTWISE REDUCE UNARY MATRIX_MULTIPLY CONSTANT SHAPE QUANTIZE DEQUANTIZE", start=0
)
_KINDS = {
    "MatMul": LayerType.MATRIX_MULTIPLY,
    "ReduceMean": LayerType.REDUCE,
    "Sqrt": LayerType.UNARY,
    "Shape": LayerType.SHAPE,
    "QuantizeLinear": LayerType.QUANTIZE,
    "DequantizeLinear": LayerType.DEQUANTIZE,
}


class Tensor:
    is_shape_tensor = False

    def __init__(self, name: str, dtype: DataType, shape: tuple[int, ...], is_network_output: bool = False) -> None:
        self.name, self.shape, self.is_network_output = name, shape, is_network_output
        self._dtype = dtype

    @property
    def dtype(self) -> DataType:
        return self._dtype

    @dtype.setter
    def dtype(self, value: DataType) -> None:
        calls.append(("dtype", [self.name, value.name]))
        self._dtype = value


class Layer:
    def __init__(self, name: str, kind: LayerType, inputs: list[Any], outputs: list[Tensor], metadata: str) -> None:
        self.name, self.type, self._inputs, self._outputs, self.metadata = name, kind, inputs, outputs, metadata
        self.num_inputs, self.num_outputs = len(inputs), len(outputs)
        self.precision_is_set = False
        self._precision = float32

    @property
    def precision(self) -> DataType:
        return self._precision

    @precision.setter
    def precision(self, value: DataType) -> None:
        calls.append(("precision", [self.name, value.name]))
        self._precision, self.precision_is_set = value, True

    def get_input(self, index: int) -> Tensor | None:
        return self._inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self._outputs[index]

    def set_output_type(self, index: int, dtype: DataType) -> None:
        calls.append(("set_output_type", [self.name, dtype.name]))


class Network:
    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.layers: list[Layer] = []

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))
    num_layers = property(lambda self: len(self.layers))

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]

    def __iter__(self) -> Any:
        return iter(self.layers)


class OnnxParser:
    num_errors = 0

    def __init__(self, network: Network, logger: Any) -> None:
        self._network, self._logger = network, logger

    def parse_from_file(self, path: str) -> bool:
        calls.append(("parse_from_file", path))
        if "parse" in fail:
            said(self._logger, fail["parse"])
            return False
        model = onnx.load(path)
        assert model.opset_import[0].version <= 17, "8.6 reads opset 17"
        types = {1: float32, 6: int32, 7: int32, 10: float16}

        def tensor(value: Any) -> Tensor:
            kind = value.type.tensor_type
            shape = tuple(d.dim_value or -1 for d in kind.shape.dim)
            return Tensor(value.name, types[kind.elem_type], shape)

        self._network.inputs = [tensor(v) for v in model.graph.input]
        results = {v.name: tensor(v) for v in model.graph.output}
        self._network.outputs = list(results.values())
        for result in results.values():
            result.is_network_output = True
        known: dict[str, Tensor] = {t.name: t for t in self._network.inputs}
        used: set[str] = set()
        for number, node in enumerate(model.graph.node):
            dtype = int32 if node.op_type == "Shape" else float32
            made = [results.get(name) or Tensor(name, dtype, (-1,)) for name in node.output]
            known |= {tensor.name: tensor for tensor in made}
            read = [known.get(name) for name in node.input]  # weights aren't tensors of the network
            name = node.name if node.name not in used else f"{node.name}_{number}"
            used.add(name)
            kind = _KINDS.get(node.op_type, LayerType.ELEMENTWISE)
            self._network.layers.append(Layer(name, kind, read, made, f"[ONNX Layer: {node.name}]"))
        return True


class TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return b"measured"


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, low: Any, usual: Any, high: Any) -> None:
        self.shapes[name] = [list(low), list(usual), list(high)]


class Config:
    DLA_core = -1
    default_device_type = DeviceType.GPU

    def __init__(self) -> None:
        self.flags: set[BuilderFlag] = {BuilderFlag.TF32}
        self.profiles: list[Profile] = []
        self.asked: dict[str, Any] = {}
        self.cache: TimingCache | None = None
        self.builder_optimization_level = 3
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE

    num_optimization_profiles = property(lambda self: len(self.profiles))

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def get_flag(self, flag: BuilderFlag) -> bool:
        return flag in self.flags

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_tactic_sources(self, sources: int) -> None:
        self.asked["tactic_sources"] = sources

    def get_tactic_sources(self) -> int:
        return self.asked.get("tactic_sources", 31)

    def set_memory_pool_limit(self, pool: MemoryPoolType, nbytes: int) -> None:
        self.asked[pool.name] = nbytes

    def get_memory_pool_limit(self, pool: MemoryPoolType) -> int:
        return self.asked.get(pool.name, 0)

    def get_preview_feature(self, feature: PreviewFeature) -> bool:
        return False

    def create_timing_cache(self, data: bytes) -> TimingCache:
        return TimingCache(bytes(data))

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True


class Builder:
    def __init__(self, logger: Any) -> None:
        self._logger = logger
        if "builder" in fail:
            said(logger, fail["builder"])
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self, flags: int) -> Network:
        calls.append(("create_network", flags))
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        time.sleep(build_seconds)
        if "build" in fail:
            said(self._logger, fail["build"])
            return None
        asked = {
            "flags": sorted(flag.name for flag in config.flags),
            "profiles": [profile.shapes for profile in config.profiles],
            "level": config.builder_optimization_level,
            "verbosity": config.profiling_verbosity.name,
            "compatibility": config.hardware_compatibility_level.name,
            "cache": id(config.cache),
            **config.asked,
        }
        calls.append(("build", asked))
        return json.dumps(asked).encode()


class Engine:
    device_memory_size = 4096
    num_io_tensors = 2
    refittable = True

    def create_execution_context_without_device_memory(self) -> Context | None:
        return None if "context" in fail else Context()


class Context:
    device_memory = 0


class Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        if "load" in fail:
            said(self._logger, fail["load"])
            return None
        return Engine()


def Weights(array: Any) -> Any:
    assert array.flags.c_contiguous
    return array


class Refitter:
    """Of an engine that has gate and up as one product."""

    _known = ("gate_weight", "up_weight")

    def __init__(self, engine: Engine, logger: Any) -> None:
        self._logger, self._given = logger, {}  # type: ignore[var-annotated]

    def get_all_weights(self) -> list[str]:
        return list(self._known)

    def set_named_weights(self, name: str, weights: Any) -> bool:
        if weights.size != 64 * 128:
            said(self._logger, "wrong count")
            return False
        self._given[name] = weights
        return True

    def get_missing_weights(self) -> list[str]:
        return [name for name in self._known if self._given and name not in self._given]

    def refit_cuda_engine(self) -> bool:
        if "refit" in fail:
            said(self._logger, fail["refit"])
            return False
        calls.append(("refit", self._given))
        return True


class IProfiler:
    pass


def init_libnvinfer_plugins(logger: Any, namespace: str) -> bool:
    return True
