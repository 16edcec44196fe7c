"""A graph lowered for TensorRT as the program that the runtime reads, and the kernels that it launches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

from llmlab.errors import EngineError
from llmlab.graph.lower.tensorrt_parts import Attend, Dense, Lowered, Normalize
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.compile import (
    attention_sources,
    compile_kernels,
    feed_source,
    norm_source,
    sampling_sources,
)
from llmlab.kernels.gpu.geometry import AttentionVariant
from llmlab.kernels.gpu.launch_norm import NormKind
from llmlab.kernels.gpu.launch_product import ProductKind
from llmlab.kernels.product_sources import product_sources
from llmlab.kernels.source import KernelSource
from llmlab.progress import make_bar
from llmlab.runtime import program as run
from llmlab.runtime.backends.tensorrt.attention import variant_of
from llmlab.runtime.backends.tensorrt.rows import norm_kind, product_kind
from llmlab.runtime.manifest import KVLayout
from llmlab.tensorrt.attention_node import AttentionNode


def to_program(lowered: Lowered) -> run.Program:
    """What the runtime reads: the parts with the names of their plans. Where weights lie outside, parts of one key share the
    plan of the first, whose names are those of its bindings."""
    tensors = {name: run.TensorSpec(t.dtype, t.width, t.rows) for name, t in lowered.tensors.items()}
    weights = {
        name: run.WeightSpec(np.dtype(w.dtype).name, tuple(int(n) for n in w.shape))
        for name, w in lowered.weights.items()
    }
    first: dict[str, tuple[str, Dense]] = {}
    steps: list[run.Step] = []
    for number, part in enumerate(lowered.parts):
        if isinstance(part, Dense):
            made = (f"part{number:03d}.plan", part)
            plan, binds = first.setdefault(part.key, made) if lowered.weights else made
            inputs, outputs = (
                dict(zip(names, own, strict=True))
                for names, own in ((binds.inputs, part.inputs), (binds.outputs, part.outputs))
            )
            steps.append(run.RunPlan(plan, inputs, outputs, part.name))
        elif isinstance(part, Attend):
            views = {name: run.View(**asdict(getattr(part, name))) for name in ("q", "k", "v")}
            steps.append(run.Attend(**{**vars(part), **views}))
        else:
            kind = run.Normalize if isinstance(part, Normalize) else run.Multiply
            steps.append(kind(**{**vars(part), "x": run.View(**asdict(part.x))}))
    return run.Program(tensors, tuple(steps), weights)


@dataclass(frozen=True)
class Kernels:
    """What the kernels of an engine are compiled for."""

    attention: tuple[AttentionVariant, ...]
    products: tuple[ProductKind, ...]
    norms: tuple[NormKind, ...]
    vocab: int
    max_rows: int
    """Of a step."""

    @classmethod
    def of(cls, lowered: Lowered, program: run.Program, kv: KVLayout, max_rows: int) -> Kernels:
        variants = dict.fromkeys(_variants(lowered, program, kv))
        kinds = dict.fromkeys(product_kind(step, program) for step in program.steps if isinstance(step, run.Multiply))
        norms = dict.fromkeys(norm_kind(step, program) for step in program.steps if isinstance(step, run.Normalize))
        return cls(tuple(variants), tuple(kinds), tuple(norms), program.tensors["logits"].width, max_rows)

    def sources(self) -> list[KernelSource]:
        attention = (source for variant in self.attention for source in attention_sources(variant))
        products = (source for kind in self.products for source in product_sources(kind, self.max_rows))
        norms = (norm_source(kind) for kind in self.norms)
        return [*attention, *products, *norms, *sampling_sources(self.vocab), feed_source()]


def compile_for(needed: Iterable[Kernels], capabilities: Iterable[tuple[int, int]]) -> KernelSet:
    """All that is needed, for all GPUs named."""
    bar, close = make_bar(0, unit="kernel")

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    try:
        architectures = [10 * major + minor for major, minor in capabilities]
        sources = [source for kernels in needed for source in kernels.sources()]
        return compile_kernels(sources, architectures, progress)
    finally:
        close()


def check_tables(lowered: Lowered, max_seq_len: int) -> None:
    """Raises EngineError where attention would read past the end of its RoPE tables."""
    for part in lowered.parts:
        if isinstance(part, Attend) and "cos" in part.tables:
            rows = len(lowered.tables[part.tables["cos"]])
            if rows < max_seq_len:
                raise EngineError(f"{part.name}: its RoPE tables have {rows} positions, max_seq_len is {max_seq_len}")


def _variants(lowered: Lowered, program: run.Program, kv: KVLayout) -> Iterable[AttentionVariant]:
    for step in program.steps:
        if isinstance(step, run.Attend):
            yield variant_of(step, program, kv, lowered.tables)
    for part in lowered.parts:
        for node in part.graph.surgeon.nodes if isinstance(part, Dense) else ():
            if node.op == "PagedAttention":
                found = AttentionNode.from_attributes(node.attrs)
                dtype = np.dtype(node.outputs[0].dtype).name
                yield AttentionVariant(found.kind, dtype, kv.dtype, found.rotary, bool(found.interleaved))
