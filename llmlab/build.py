"""The serving graph → an engine folder for one target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.checkpoint import eos_ids, generation_config
from llmlab.errors import InputError
from llmlab.files import atomic_folder, write_json
from llmlab.graph.graph import Graph
from llmlab.graph.store.storage import External, write_onnx
from llmlab.progress import begins
from llmlab.provenance import Step, step
from llmlab.runtime.engine import TARGETS, Engine
from llmlab.runtime.manifest import (
    MANIFEST,
    MODEL,
    ORIGINS,
    PREFILL_MODEL,
    PREFILL_WEIGHTS,
    WEIGHTS,
    Compiled,
    KVLayout,
    Limits,
    Manifest,
    Products,
    slot_capacity,
)
from llmlab.tensorrt.config import BuildConfig

if TYPE_CHECKING:
    from llmlab.kernels.binaries import KernelSet

DEFAULT_MAX_SEQ_LEN = 8192  # tokens, where the model allows as many
DEFAULT_MAX_TOKENS_PER_STEP = 256
DEFAULT_ACCURACY_LEVEL = 4


def build(
    graph: Graph,
    path: str | Path,
    *,
    target: str = "onnxruntime",
    max_seq_len: int | None = None,
    max_tokens_per_step: int | None = None,
    config: BuildConfig | None = None,
    kernels: KernelSet | None = None,
    accuracy_level: int | None = None,
    prefill: str | None = None,
    overwrite: bool = False,
) -> Engine:
    """Compile a serving graph for `target` and write it as the engine folder `path`, whole or not at all.

    target: onnxruntime, tensorrt or tensorrt-rtx.
    max_seq_len: longest sequence in tokens, prompt and output together (default: what the model was made for, at
        most 8192). max_tokens_per_step: most new tokens that one step takes, which is how prompts are chunked
        (default: 256, for TensorRT 2048). Both go before those of `config`.
    config: for TensorRT, how to build. kernels: for TensorRT, attention and sampling kernels that were compiled
        elsewhere, by `llmlab.build_tensorrt.kernels_for`, for a machine without triton.
    accuracy_level: for ONNX Runtime, what products compute in whose weights alone are quantized: 1 float32; 4 int8, activations being
        rounded by blocks of a row, several times faster (default: 4).
    prefill: for ONNX Runtime, "int8" lets steps of many tokens multiply int8 by int8: activations rounded by rows, those weights by
        channels. The fastest prefill; the engine holds them in both forms, a byte more for each number.
        A token's logits then depend, within that rounding, on how many tokens share its step.
    overwrite: replace an engine that is there.
    Raises InputError for a graph that isn't a serving graph, an unknown target, or sizes the model doesn't allow;
    for TensorRT also UnsupportedModelError that names a node, and EngineError where a part can't be built.
    """
    if not isinstance(graph, Graph) or graph.kind != "serving":
        raise InputError("expected a serving graph: pass what llmlab.optimize returned")
    check_target(target, accuracy_level, prefill)
    if target == "onnxruntime" and (config is not None or kernels is not None):
        raise InputError("config and kernels are for TensorRT: pass target='tensorrt' or 'tensorrt-rtx'")
    longest = graph.config.max_position_embeddings
    if max_seq_len is None and config is not None:
        max_seq_len = config.max_seq_len
    seq = _size("max_seq_len", max_seq_len, min(longest, DEFAULT_MAX_SEQ_LEN), longest)
    default = DEFAULT_MAX_TOKENS_PER_STEP
    if target != "onnxruntime":
        config = config or BuildConfig()
        default = config.max_tokens_per_step
    at_once = _size("max_tokens_per_step", max_tokens_per_step, default, 1 << 16)
    limits = Limits(seq, at_once)
    made = _step(target, max_seq_len, max_tokens_per_step, config, kernels, accuracy_level, prefill)
    if target == "onnxruntime":
        parts = _onnxruntime(graph, limits, accuracy_level, prefill)
        return _write(graph, Path(path), target, limits, overwrite, made, *parts)
    assert config is not None
    config = replace(config, max_tokens_per_step=at_once, max_batch=min(config.max_batch, at_once), max_seq_len=seq)
    parts = _tensorrt(graph, target, limits, config, kernels)
    return _write(graph, Path(path), target, limits, overwrite, made, *parts)


def _step(
    target: str,
    max_seq_len: int | None,
    max_tokens_per_step: int | None,
    config: BuildConfig | None,
    kernels: KernelSet | None,
    accuracy_level: int | None,
    prefill: str | None,
) -> Step:
    given: dict[str, Any] = {"target": target, "max_seq_len": max_seq_len, "max_tokens_per_step": max_tokens_per_step}
    given |= {"kernels": kernels, "accuracy_level": accuracy_level, "prefill": prefill}
    if config is not None:
        usual = BuildConfig()
        changed = {key: value for key, value in vars(config).items() if value != getattr(usual, key)}
        given |= {"config": changed} if changed else {}
    return step("build", given, dict.fromkeys(given) | {"target": "onnxruntime"})


Parts = tuple[KVLayout, str, Compiled | None, Products | None, Callable[[Path], None]]
"""Layout of the KV cache, precision, what TensorRT engines say of their plans and others of their quantized products, and what
writes the compiled parts."""


def _onnxruntime(graph: Graph, limits: Limits, accuracy_level: int | None, prefill: str | None) -> Parts:
    from llmlab.graph.lower.onnxruntime import cache_layout, lower
    from llmlab.graph.lower.onnxruntime_int8 import for_many_rows
    from llmlab.graph.lower.origins import origins

    begins("lowering the graph")
    capacity = slot_capacity(limits)
    level = DEFAULT_ACCURACY_LEVEL if accuracy_level is None else accuracy_level
    lowered = lower(graph, capacity, accuracy_level=level, max_tokens=limits.max_tokens_per_step)
    cache = cache_layout(graph, lowered)
    rounding = "" if cache.rounding == cache.dtype else cache.rounding
    kv = KVLayout("slots", cache.dtype, capacity, cache.layers, rounding)
    graphs = {(MODEL, WEIGHTS): lowered}
    quantized = any(n.op == "MatMulNBits" for n in lowered.surgeon.nodes)
    if prefill is not None:
        if not quantized:
            raise InputError("prefill is for weights that alone are quantized, to int4 or int8: there are none here")
        graphs[PREFILL_MODEL, PREFILL_WEIGHTS] = for_many_rows(lowered)

    def write(work: Path) -> None:
        written: dict[int, External] = {}
        for names, part in graphs.items():
            begins(f"writing {names[0]} and its weights")
            write_onnx(part.surgeon, work, *names, written=written)
        found = {model: origins(graph, part).to_dict() for (model, _), part in graphs.items()}
        write_json(work / ORIGINS, found)

    half = "" if graph.activations == "float32" else f" rounded to {graph.activations}"
    return kv, f"float32{half}", None, Products(level, prefill or "") if quantized else None, write


def _tensorrt(graph: Graph, target: str, limits: Limits, config: BuildConfig, kernels: KernelSet | None) -> Parts:
    from llmlab.build_tensorrt import prepare, write

    begins("lowering the graph")
    made = prepare(graph, target, config, limits.max_seq_len)
    return made.kv, config.precision, made.compiled, None, lambda work: write(made, kernels, work, limits.max_seq_len)


def _write(
    graph: Graph,
    path: Path,
    target: str,
    limits: Limits,
    overwrite: bool,
    made: Step,
    kv: KVLayout,
    precision: str,
    compiled: Compiled | None,
    products: Products | None,
    write: Callable[[Path], None],
) -> Engine:
    manifest = Manifest(
        target=target,
        precision=precision,
        model=graph.config.to_dict(),
        kv=kv,
        limits=limits,
        eos_token_ids=eos_ids(graph.config, graph.assets),
        generation=generation_config(graph.assets),
        passes=tuple((r.name, r.rewrites) for r in graph.history),
        compiled=compiled,
        recipe=graph.recipe,
        products=products,
        steps=tuple(entry.to_dict() for entry in (*graph.steps, made)),
    )
    with atomic_folder(path, overwrite=overwrite, marker=MANIFEST) as work:
        write(work)
        for name, data in graph.assets.items():
            (work / name).write_bytes(data)
        begins("hashing the files")
        manifest.write(work)
        begins("moving the folder into place")
    return Engine(path, Manifest.read(path))


def check_target(target: str, accuracy_level: int | None = None, prefill: str | None = None) -> None:
    """Raises InputError for a target that this llmlab can't build for, and for options that it doesn't have."""
    if target not in TARGETS:
        raise InputError(f"target is {target!r}; available: {', '.join(TARGETS)}")
    if target != "onnxruntime" and (accuracy_level is not None or prefill is not None):
        raise InputError("accuracy_level and prefill are for ONNX Runtime: pass target='onnxruntime'")
    from llmlab.graph.lower.onnxruntime_nbits import check_accuracy_level

    check_accuracy_level(DEFAULT_ACCURACY_LEVEL if accuracy_level is None else accuracy_level)
    if prefill not in (None, "int8"):
        raise InputError(f"prefill is {prefill!r}; available: int8")


def _size(name: str, given: int | None, default: int, most: int) -> int:
    if given is None:
        return default
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= most:
        raise InputError(f"{name} is {given!r}, expected an integer from 1 to {most}")
    return given
