"""Kernels compiled ahead of time, for GPUs that need not be here, in processes of their own.

Their own, so that this one keeps its environment (Triton's interpreter, a debugger's hooks), and so that many compile at once.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import llmlab
from llmlab.errors import EngineError, InputError, require
from llmlab.kernels.binaries import Kernel, KernelSet
from llmlab.kernels.gpu import geometry, launch_norm
from llmlab.kernels.gpu.geometry import AttentionVariant, Launch, SamplingGrid
from llmlab.kernels.gpu.launch_norm import NormKind
from llmlab.kernels.source import TRITON_TYPES, KernelSource

SHARED_LIMITS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, 121: 99}
"""KiB of shared memory that one block may have, by architecture (CUDA C++ Programming Guide, compute capabilities)."""

_FLOATS = ("partial", "partial_lse", "cos", "sin", "alibi_slopes", "sinks", "k_scale", "v_scale")
_INTEGERS = ("q_stride", "k_stride", "v_stride", "table_stride", "splits", "num_seqs")
_INTEGER_TENSORS = ("query_start", "kv_len", "block_table", "position_ids")
_ALIGNED = ("q", "k", "v", "q_out", "out", "pool", "cos", "sin", "partial")
_SAMPLING_TYPES = {
    **dict.fromkeys(("hist", "state", "mass"), "*i64"),
    **dict.fromkeys(("parts", "temperature", "top_p", "min_p", "uniform"), "*fp32"),
    **dict.fromkeys(("tokens", "first", "top_k"), "*i32"),
    **dict.fromkeys(("splits", "step"), "i32"),
}
_ALIGNED_NUMBERS = ("q_stride", "k_stride", "v_stride", "pool_half")


def compile_attention(
    variants: Iterable[AttentionVariant],
    architectures: Iterable[int],
    progress: Callable[[int, int], object] | None = None,
) -> KernelSet:
    """All that `kernels/attention.py` launches for these layers, for each architecture (90 for sm_90).

    `progress` is told how many kernels are done, of how many. Raises InputError for what can't be built, EngineError where the compiler fails.
    """
    architectures, variants = list(architectures), list(variants)
    for variant in variants:
        check_architectures(variant.kv_dtype, architectures)
    return compile_kernels((s for v in variants for s in attention_sources(v)), architectures, progress)


def check_architectures(kv_dtype: str, architectures: Iterable[int]) -> None:
    """Raises InputError for GPUs that can't convert a KV pool of this type."""
    if kv_dtype == "float8_e4m3fn" and (old := [a for a in architectures if a < 89]):
        raise InputError(
            f"a float8_e4m3fn KV pool needs sm_89 or later, not sm_{old[0]}: choose int8, or leave that out"
        )


def attention_sources(variant: AttentionVariant) -> list[KernelSource]:
    """The kernels of one layer."""
    kind = variant.kind
    decode, prefill, write = (f"llmlab.kernels.gpu.{module}" for module in ("decode", "prefill", "write"))
    launches = [
        *((f"{prefill}:paged_prefill", launch) for launch in geometry.prefill_launches(kind)),
        *((f"{decode}:paged_decode", geometry.decode(kind, 1, splits)) for splits in (1, 2)),
        (f"{decode}:merge_splits", geometry.merge(kind, 1)),
        (f"{write}:rope_and_write", variant.write(1)),
    ]
    locate = geometry.locate(kind.block_size, 1)
    return [
        *(_attention_source(variant, function, launch) for function, launch in launches),
        KernelSource(f"{write}:locate_tokens", _types(variant), locate.constants, locate.options),
    ]


def _types(variant: AttentionVariant) -> dict[str, str]:
    return {
        **dict.fromkeys(("out", "q", "k", "v", "q_out"), TRITON_TYPES[variant.dtype]),
        "pool": TRITON_TYPES[variant.kv_dtype],
        **dict.fromkeys(_FLOATS, "*fp32"),
        **dict.fromkeys(_INTEGER_TENSORS, "*i32"),
        **dict.fromkeys(_INTEGERS, "i32"),
        "slots": "*i64",
        "pool_half": "i64",
        "scale": "fp32",
    }


def _attention_source(variant: AttentionVariant, function: str, launch: Launch) -> KernelSource:
    kind = variant.kind
    has = {
        ("alibi_slopes",): kind.alibi,
        ("sinks",): kind.sinks,
        ("k_scale", "v_scale"): kind.quantized,
        ("cos", "sin"): variant.rotary > 0,
        ("partial", "partial_lse", "splits"): launch.constants.get("SPLIT", True),
    }
    null = tuple(name for names, there in has.items() if not there for name in names)
    aligned = (*_ALIGNED, *_ALIGNED_NUMBERS) if kind.head_dim % 16 == 0 else ()
    labels = variant.constants(launch)
    return KernelSource(function, _types(variant), launch.constants, launch.options, null, aligned, labels)


def compile_sampling(
    vocab: int,
    architectures: Iterable[int],
    dtype: str = "float32",
    progress: Callable[[int, int], object] | None = None,
) -> KernelSet:
    """All that `kernels/sampling.py` launches for logits [N, vocab] of float32 or float16; as `compile_attention`."""
    return compile_kernels(sampling_sources(vocab, dtype), architectures, progress)


def sampling_sources(vocab: int, dtype: str = "float32") -> list[KernelSource]:
    """The kernels that choose tokens."""
    types = {**_SAMPLING_TYPES, "logits": TRITON_TYPES[dtype]}
    aligned = ("logits", "hist", "mass", "parts", "first")
    return [
        KernelSource(
            f"llmlab.kernels.gpu.sampling:{name}",
            types,
            launch.constants,
            launch.options,
            aligned=aligned,
            labels={**launch.constants, "dtype": dtype},
        )
        for name, launch in SamplingGrid(1, vocab, 1).launches().items()
    ]


def feed_source() -> KernelSource:
    """The kernel that makes sampled tokens the next step's inputs."""
    launch = geometry.feed(1)
    types = {"ids": "*i32", "previous": "*i32", "count": "i32"}
    return KernelSource("llmlab.kernels.gpu.feed:feed_tokens", types, launch.constants, launch.options)


def norm_source(kind: NormKind) -> KernelSource:
    """The kernel of one RMS norm, shared by others of its width."""
    launch = launch_norm.launch(kind, 1)
    types = {
        "out": TRITON_TYPES[kind.out_dtype],
        "x": TRITON_TYPES[kind.dtype],
        "weight": TRITON_TYPES[kind.weight_dtype],
        "epsilon": "fp32",
        **dict.fromkeys(("width", "x_stride"), "i32"),
    }
    aligned = ("out", "x", "weight", "width", "x_stride")
    function = "llmlab.kernels.gpu.norm:rms_norm"
    return KernelSource(function, types, launch.constants, launch.options, aligned=aligned, labels=kind.labels)


def compile_kernels(
    sources: Iterable[KernelSource], architectures: Iterable[int], progress: Callable[[int, int], object] | None = None
) -> KernelSet:
    """Every source for every architecture; as `compile_attention`."""
    require("triton", "tensorrt")
    architectures = sorted(set(architectures))
    if unknown := [a for a in architectures if a not in SHARED_LIMITS]:
        known = ", ".join(f"sm_{a}" for a in SHARED_LIMITS)
        raise InputError(f"no kernels can be compiled for sm_{unknown[0]}: known are {known}")
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    distinct = dict.fromkeys(json.dumps(asdict(source), sort_keys=True) for source in sources)
    for source in distinct:
        for architecture in architectures:
            limit = SHARED_LIMITS[architecture] << 10
            jobs.put(json.dumps({**json.loads(source), "architecture": architecture, "shared_limit": limit}))
    total = jobs.qsize()
    kernels: list[Kernel] = []
    compilers = [_Compiler() for _ in range(min(total, len(os.sched_getaffinity(0)), 16))]

    def work(compiler: _Compiler) -> None:
        while True:
            try:
                job = jobs.get_nowait()
            except queue.Empty:
                return
            kernels.append(compiler.compile(job))
            if progress is not None:
                progress(len(kernels), total)

    try:
        with ThreadPoolExecutor(max(1, len(compilers))) as pool:
            futures = [pool.submit(work, compiler) for compiler in compilers]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:  # of a compiler, or Ctrl-C: the others stop at once
                for compiler in compilers:
                    compiler.stop()
                raise
    finally:
        for compiler in compilers:
            compiler.stop()
    return KernelSet(sorted(kernels, key=lambda kernel: (kernel.architecture, kernel.name, kernel.file)))


class _Compiler:
    """A process that compiles one kernel after another."""

    def __init__(self) -> None:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
        env["PYTHONPATH"] = os.pathsep.join(
            [str(Path(llmlab.__file__).parents[1]), *filter(None, [env.get("PYTHONPATH")])]
        )
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llmlab.kernels.compile_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=env,
            text=True,
        )

    def compile(self, job: str) -> Kernel:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(job + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except (OSError, ValueError):  # it ended, or was stopped
            answer = ""
        given = json.loads(job)
        what = f"{given['function'].partition(':')[2]} for sm_{given['architecture']}"
        if not answer:
            self._said.seek(0)
            lines = self._said.read().decode(errors="replace").strip().splitlines()
            raise EngineError(
                f"the kernel compiler ended while compiling {what}: {lines[-1] if lines else 'it said nothing'}"
            )
        result = json.loads(answer)
        if "error" in result:
            raise EngineError(f"{what} can't be compiled: {result['error']}")
        return Kernel(
            name=result["name"],
            constants={**(given["labels"] or given["constants"]), **result["tuned"]},
            architecture=given["architecture"],
            parameters=tuple((name, kind) for name, kind in result["parameters"]),
            num_warps=result["num_warps"],
            shared=result["shared"],
            aligned=bool(given["aligned"]),
            cubin=base64.b64decode(result["cubin"]),
        )

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was still to be written
                    pipe.close()
        self._said.close()
