"""The serving graph → an engine folder for TensorRT: parts compiled one at a time, kernels, and the program that runs them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmlab.errors import EngineError, InputError, require
from llmlab.files import write_json
from llmlab.graph.convert import convert
from llmlab.graph.graph import Graph
from llmlab.graph.lower.tensorrt import lower
from llmlab.graph.lower.tensorrt_parts import Dense, Lowered
from llmlab.graph.store.storage import write_onnx
from llmlab.graph.store.tensor_file import write_tensors
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.compile import check_architectures
from llmlab.kernels.gpu.geometry import QUANTIZED_POOLS
from llmlab.program_tensorrt import Kernels, check_tables, compile_for, to_program
from llmlab.progress import begins
from llmlab.runtime import program as run
from llmlab.runtime.manifest import LAYERS, ORIGINS, PROGRAM, TABLES, TENSORS, Compiled, KVLayout
from llmlab.tensorrt.builder import PlanBuilder
from llmlab.tensorrt.config import BuildConfig
from llmlab.tensorrt.gpu import visible_gpu
from llmlab.tensorrt.inspect import inspect_plan
from llmlab.tensorrt.library import Library, resolve
from llmlab.tensorrt.precision import WeakTyping

_LEVEL = (
    5  # where products are kernels, what is left is small and the same for all layers: the longest search costs seconds
)
_MOST_ELEMENTS = (1 << 31) - 1  # of a tensor that TensorRT addresses


@dataclass(frozen=True)
class Build:
    """What is to be written: everything that is decided before anything is compiled."""

    library: Library
    hosting: str
    config: BuildConfig
    lowered: Lowered
    program: run.Program
    kv: KVLayout
    kernels: Kernels
    capabilities: tuple[tuple[int, int], ...]

    @property
    def compiled(self) -> Compiled:
        config = self.config
        return Compiled(
            str(self.library),
            self.hosting,
            self.capabilities,
            config.max_batch,
            tuple(config.decode_buckets),
            "kernels" if self.lowered.weights else "tensorrt",
        )


def prepare(graph: Graph, target: str, config: BuildConfig, max_seq_len: int) -> Build:
    """Lower a serving graph. Raises InputError for what this TensorRT can't do, UnsupportedModelError that names a node."""
    library = resolve("tensorrt-rtx" if target == "tensorrt-rtx" else "tensorrt")
    hosting = library.hosting(config.attention)
    if hosting == "native":
        raise InputError("attention='native' can be lowered and compiled, not run: build with 'plugin' or 'piecewise'")
    dtype = _dtype(graph)
    weak = None
    if not library.strongly_typed:
        weak = None if config.precision == "float32" else config.precision
    elif dtype == "float32" and config.precision != "float32":
        graph, dtype = convert(graph, config.precision), config.precision
    if weak is None and dtype != config.precision:
        raise InputError(f"the graph is in {dtype} and precision is {config.precision!r}: pass precision={dtype!r}")
    block_size = config.block_size if hosting == "plugin" else None
    products = _products(config, hosting)
    if products and not library.rtx and config.optimization_level is None:
        config = replace(config, optimization_level=_LEVEL)
    lowered = lower(
        graph, hosting=hosting, dialect=library.opset, weak_type=weak, block_size=block_size, products=products
    )
    kv = _kv_layout(graph, config)
    program = to_program(lowered)
    gpu = visible_gpu()
    here = () if gpu is None else (gpu.compute_capability,)
    capabilities = library.check_capabilities(config.compute_capabilities) or here
    check_architectures(kv.dtype, [10 * major + minor for major, minor in capabilities])
    check_tables(lowered, max_seq_len)
    kernels = Kernels.of(lowered, program, kv, config.max_tokens_per_step)
    return Build(library, hosting, config, lowered, program, kv, kernels, capabilities)


def _products(config: BuildConfig, hosting: str) -> bool:
    """Whether products are kernels. Raises InputError where they can't be."""
    can = hosting == "piecewise" and config.precision != "float32"
    if config.products == "kernels" and not can:
        raise InputError(
            f"products='kernels' is for piecewise hosting in float16 or bfloat16, this is {hosting} in {config.precision}"
        )
    return can and config.products != "tensorrt"


def write(build: Build, kernels: KernelSet | None, work: Path, max_seq_len: int) -> None:
    """Compile and write all files but the manifest and the graph's assets. Ctrl-C stops in the middle."""
    if kernels is None:
        begins("compiling kernels")
        kernels = compile_for([build.kernels], build.capabilities)
    kernels.write(work)
    write_json(work / PROGRAM, build.program.to_dict())
    save_file = require("safetensors.numpy", "tensorrt").save_file
    save_file(dict(build.lowered.tables), work / TABLES)
    if build.lowered.weights:
        begins("writing the weights")
        write_tensors(work / TENSORS, build.lowered.weights)
    dense = (part for part in build.lowered.parts if isinstance(part, Dense))
    steps = (step for step in build.program.steps if isinstance(step, run.RunPlan))
    plans: dict[str, Dense] = {}  # what several parts run is built once
    for part, step in zip(dense, steps, strict=True):
        plans.setdefault(step.plan, part)
    records: list[dict[str, Any]] = []
    layers: dict[str, Any] = {}
    begins(f"compiling {len(plans)} part{'s' if len(plans) > 1 else ''} with {build.library}")
    with PlanBuilder(build.library, build.config, total=len(plans)) as builder:
        for plan, part in plans.items():
            made = _compile(builder, build, part, max_seq_len, work)
            (work / plan).write_bytes(made.data)
            records.append({"plan": plan, "name": part.name, "key": part.key, "seconds": round(made.seconds, 3)})
            if part.key not in layers:  # parts of one key have the same
                layers[part.key] = made.listing or _inspected(build.library, made.data, part.name)
    write_json(work / LAYERS, {"parts": records, "layers": layers})
    nodes = [[n.name for n in part.graph.surgeon.nodes] for part in build.lowered.parts if isinstance(part, Dense)]
    write_json(work / ORIGINS, {"model": build.lowered.origins.to_dict(), "parts": nodes})


def _inspected(library: Library, plan: memoryview, name: str) -> dict[str, Any]:
    """What the engine inspector says; an engine is none the worse where that can't be read."""
    try:
        return inspect_plan(library, plan, name)
    except EngineError as problem:
        return {"error": str(problem)}


def kernels_for(graph: Graph, config: BuildConfig) -> KernelSet:
    """The kernels that an engine of this graph launches, compiled for `config.compute_capabilities` on a machine that needs
    neither a GPU nor TensorRT: for `build(..., kernels=...)` on one that has no triton. Products are among them unless
    `config.products` says otherwise, as are those of a TensorRT that chooses precisions itself."""
    narrow = convert(graph, config.precision) if _dtype(graph) == "float32" else graph
    kv = _kv_layout(graph, config)
    products = _products(config, config.attention or "piecewise")
    ways: list[Lowered] = [lower(narrow, products=products)]
    if products and graph is not narrow and config.precision == "float16":
        ways.append(lower(graph, dialect=17, weak_type="float16", products=True))
    needed = [Kernels.of(lowered, to_program(lowered), kv, config.max_tokens_per_step) for lowered in ways]
    return compile_for(needed, config.compute_capabilities)


def _compile(builder: PlanBuilder, build: Build, part: Dense, max_seq_len: int, work: Path) -> Any:
    """One part, through an ONNX file that is gone afterwards."""
    types = {name: tensor.dtype for name, tensor in build.lowered.tensors.items()}
    types |= {name: weight.dtype for name, weight in build.program.weights.items()}
    names = sorted({*part.inputs, *part.outputs} & set(types))
    weak = WeakTyping({name: types[name] for name in names}, part.keep_fp32)
    most_blocks = -(-max_seq_len // build.kv.capacity)
    sizes = {"W": (1, most_blocks, most_blocks), "blocks": _pool_range(build, most_blocks)}
    shapes = {name: _shape(build, name) for name in part.inputs if name not in build.program.weights}
    with tempfile.TemporaryDirectory(prefix=f"{work.name}.onnx.", dir=work.parent) as folder:
        write_onnx(part.graph.surgeon, Path(folder), "part.onnx", "part.bin")
        return builder.build(
            Path(folder) / "part.onnx",
            builder.config.profiles(shapes, sizes),
            name=part.name,
            key=part.key,
            weak=None if build.library.strongly_typed else weak,
            plugin=build.hosting == "plugin",
        )


def _shape(build: Build, name: str) -> Sequence[int | str]:
    """The sizes of an input of a part, those of a step by name."""
    if name in build.lowered.tensors:
        tensor = build.lowered.tensors[name]
        return (tensor.rows, tensor.width) if tensor.width else (tensor.rows,)
    if name.startswith("kv_cache."):
        heads, dim = build.kv.layers[int(name.removeprefix("kv_cache."))]
        return (2, "blocks", heads, build.kv.capacity, dim)
    known: Mapping[str, Sequence[int | str]] = {
        "query_start": ("B1",),
        "kv_len": ("B",),
        "block_table": ("B", "W"),
        "logits_index": ("N",),
    }
    return known.get(name, ("T",))


def _pool_range(build: Build, most_blocks: int) -> tuple[int, int, int]:
    largest = max(2 * heads * dim * build.kv.capacity for heads, dim in build.kv.layers)
    most = _MOST_ELEMENTS // largest
    return (1, min(most, build.config.max_batch * most_blocks), most)


def _dtype(graph: Graph) -> str:
    return graph.activations


def _kv_layout(graph: Graph, config: BuildConfig) -> KVLayout:
    """The pools that the graph's layers want, in their order; the type is the precision's where the cache isn't quantized."""
    pools = {int(t.name.rpartition(".")[2]): t for t in graph.surgeon.inputs if t.name.startswith("kv_cache.")}
    layers = tuple((int(pools[i].shape[2]), int(pools[i].shape[4])) for i in range(len(pools)))
    dtype = np.dtype(pools[0].dtype).name
    return KVLayout("paged", dtype if dtype in QUANTIZED_POOLS else config.precision, config.block_size, layers)
