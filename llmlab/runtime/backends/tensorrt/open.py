"""An engine folder for TensorRT → a backend: checked against what is here, loaded, and given its memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from llmlab.cuda import Device, DeviceBuffer, Stream
from llmlab.errors import EngineError, InputError, require
from llmlab.files import read_bytes, read_json
from llmlab.kernels.binaries import KernelSet
from llmlab.runtime.backends.tensorrt.attention import AttentionLayers, Tables
from llmlab.runtime.backends.tensorrt.backend import TensorRTBackend
from llmlab.runtime.backends.tensorrt.bindings import Bindings
from llmlab.runtime.backends.tensorrt.check import check_program, check_tables
from llmlab.runtime.backends.tensorrt.executor import Executor
from llmlab.runtime.backends.tensorrt.memory import Activations, KVPool, pool_blocks
from llmlab.runtime.backends.tensorrt.parts import Part
from llmlab.runtime.backends.tensorrt.rows import RowLayers
from llmlab.runtime.backends.tensorrt.staging import Staging
from llmlab.runtime.backends.tensorrt.tokens import Tokens
from llmlab.runtime.backends.tensorrt.weights import Weights, find_weights
from llmlab.runtime.batch import EngineLimits
from llmlab.runtime.manifest import PROGRAM, TABLES, Compiled, Manifest
from llmlab.runtime.program import Program, RunPlan
from llmlab.tensorrt.library import Library, resolve


def open_backend(
    folder: Path, manifest: Manifest, *, max_num_seqs: int, kv_blocks: int | None, kv_memory_fraction: float | None
) -> TensorRTBackend:
    """Raises InputError for sizes that this engine doesn't take, EngineError for an engine that can't run here."""
    compiled = manifest.compiled
    assert compiled is not None
    if (
        isinstance(max_num_seqs, bool)
        or not isinstance(max_num_seqs, int)
        or not 1 <= max_num_seqs <= compiled.max_batch
    ):
        raise InputError(
            f"max_num_seqs is {max_num_seqs!r}, expected an integer from 1 to {compiled.max_batch}, what {folder} was built for"
        )
    library = resolve("tensorrt-rtx" if manifest.target == "tensorrt-rtx" else "tensorrt")
    library.check_built_by(compiled.library, str(folder))
    library.require_gpu()
    device = Device.open()
    check_gpu(folder, compiled, device)
    program, tables = read_program(folder, manifest)
    kernels = KernelSet.read(folder)
    limits = manifest.limits
    blocks_a_sequence = -(-limits.max_seq_len // manifest.kv.capacity)
    sizes = limits.max_tokens_per_step, compiled.max_batch
    vocab = program.tensors["logits"].width

    stream = Stream()
    weights = Weights.load(find_weights(folder, program, manifest), stream)
    parts = load_parts(folder, manifest, library, program, kernels, device)
    scratch = DeviceBuffer(max((part.scratch_bytes for part in parts.values()), default=0), "what TensorRT computes in")
    activations = Activations.allocate(program, *sizes)
    staging = Staging(*sizes, blocks_a_sequence)
    attention = AttentionLayers(program, manifest.kv, tables, kernels, device, sizes)
    rows = RowLayers(program, kernels, device, sizes)
    tokens = Tokens(kernels, device, vocab, compiled.max_batch)
    most = min(part.most_blocks for part in parts.values())
    wanted = 2 * max_num_seqs * blocks_a_sequence
    pool = KVPool(
        manifest.kv,
        pool_blocks(manifest.kv, device, wanted, most, kv_blocks=kv_blocks, kv_memory_fraction=kv_memory_fraction),
    )
    addresses = {
        **weights.addresses,
        **activations.addresses,
        **staging.addresses,
        "slots": attention.slots,
        **{f"kv_cache.{layer}": address for layer, address in enumerate(pool.addresses)},
    }
    bindings = Bindings(program, addresses, manifest.kv, pool.num_blocks)
    attention.bind(addresses, pool.num_blocks)
    rows.bind(addresses)
    tokens.bind(staging.addresses, addresses["logits"])
    for part in parts.values():
        part.bind(bindings, scratch, stream)
    stream.synchronize()
    buffers = (weights.buffer, activations.buffer, scratch)
    executor = Executor(program, parts, attention, rows, bindings, stream, buffers)
    return TensorRTBackend(
        device=device,
        stream=stream,
        limits=EngineLimits(
            vocab_size=vocab,
            max_seq_len=limits.max_seq_len,
            max_tokens_per_step=limits.max_tokens_per_step,
            num_blocks=pool.num_blocks,
            block_size=manifest.kv.capacity,
        ),
        max_batch=compiled.max_batch,
        executor=executor,
        pool=pool,
        staging=staging,
        tokens=tokens,
        own_buckets=compiled.decode_buckets,
    )


def check_gpu(folder: Path, compiled: Compiled, device: Device) -> None:
    """Raises EngineError for an engine that was compiled for other GPUs."""
    if device.compute_capability not in compiled.compute_capabilities:
        built = ", ".join(f"{major}.{minor}" for major, minor in compiled.compute_capabilities)
        here = "{}.{}".format(*device.compute_capability)
        raise EngineError(
            f"{folder}: built for compute capability {built}, this GPU ({device.name}) is {here}: build the engine for it"
        )


def read_program(folder: Path, manifest: Manifest) -> tuple[Program, Tables]:
    """Raises EngineError for a program that isn't one, that doesn't fit the manifest, or whose tables are not there."""
    path = folder / PROGRAM
    data, tables = read_json(path, EngineError), _read_tables(folder, manifest)
    try:
        program = Program.from_dict(data)
        check_program(program, manifest)
        check_tables(program, tables, manifest.max_seq_len)
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise EngineError(f"{path}: {problem or type(problem).__name__}: altered, build the engine again") from problem
    return program, tables


def _read_tables(folder: Path, manifest: Manifest) -> Tables:
    load = require("safetensors.numpy", "tensorrt").load
    try:
        tables = load(_read(folder, TABLES, manifest))
    except EngineError:
        raise
    except Exception as problem:  # safetensors raises types of its own
        raise EngineError(f"{folder / TABLES}: can't be read ({problem}): build the engine again") from problem
    return {name: np.ascontiguousarray(table, np.float32) for name, table in tables.items()}


def load_parts(
    folder: Path, manifest: Manifest, library: Library, program: Program, kernels: KernelSet, device: Device
) -> dict[int, Part]:
    """By their place in the program. A plan's bytes are read, loaded and let go before the next, once for all that run it."""
    plans = {at: step for at, step in enumerate(program.steps) if isinstance(step, RunPlan)}
    reporting: Callable[[], AbstractContextManager[None]] = nullcontext
    with ExitStack() as held:
        if len(plans) == len(program.steps):  # attention runs inside
            from llmlab.tensorrt.plugin import plugin_host

            host = plugin_host(library.module)
            reporting = host.reporting
            held.enter_context(reporting())
            held.enter_context(host.launching(kernels, device))
        files = dict.fromkeys(step.plan for step in plans.values())
        engines = {file: library.load(_read(folder, file, manifest), str(folder / file)) for file in files}
        contexts: dict[str, dict[int, Any]] = {file: {} for file in files}
        return {
            at: Part(library, engines[step.plan], step, program.weights, reporting, contexts[step.plan])
            for at, step in plans.items()
        }


def _read(folder: Path, name: str, manifest: Manifest) -> bytes:
    return read_bytes(folder / name, EngineError, int(manifest.files[name]["size"]))
