"""The serving graph → an engine folder for one target."""

from __future__ import annotations

from pathlib import Path

from llmlab.checkpoint import eos_ids, generation_config
from llmlab.errors import InputError
from llmlab.files import atomic_folder
from llmlab.graph.graph import Graph
from llmlab.graph.store.storage import write_onnx
from llmlab.runtime.engine import TARGETS, Engine
from llmlab.runtime.manifest import MANIFEST, MODEL, WEIGHTS, KVLayout, Limits, Manifest, slot_capacity

DEFAULT_MAX_SEQ_LEN = 8192  # tokens, where the model allows as many
DEFAULT_MAX_TOKENS_PER_STEP = 256


def build(
    graph: Graph,
    path: str | Path,
    *,
    target: str = "onnxruntime",
    max_seq_len: int | None = None,
    max_tokens_per_step: int | None = None,
    overwrite: bool = False,
) -> Engine:
    """Compile a serving graph for `target` and write it as the engine folder `path`, whole or not at all.

    max_seq_len: longest sequence in tokens, prompt and output together (default: what the model was made for, at
        most 8192). max_tokens_per_step: most new tokens that one step takes, which is how prompts are chunked
        (default 256). overwrite: replace an engine that is there.
    Raises InputError for a graph that isn't a serving graph, an unknown target, or sizes the model doesn't allow.
    """
    if not isinstance(graph, Graph) or graph.kind != "serving":
        raise InputError("expected a serving graph: pass what llmlab.optimize returned")
    check_target(target)
    longest = graph.config.max_position_embeddings
    limits = Limits(
        max_seq_len=_size("max_seq_len", max_seq_len, min(longest, DEFAULT_MAX_SEQ_LEN), longest),
        max_tokens_per_step=_size("max_tokens_per_step", max_tokens_per_step, DEFAULT_MAX_TOKENS_PER_STEP, 1 << 16),
    )
    from llmlab.graph.lower.onnxruntime import kv_layers, lower

    capacity = slot_capacity(limits)
    lowered = lower(graph, capacity)
    manifest = Manifest(
        target=target,
        precision="float32",
        model=graph.config.to_dict(),
        kv=KVLayout("slots", "float32", capacity, kv_layers(lowered)),
        limits=limits,
        eos_token_ids=eos_ids(graph.config, graph.assets),
        generation=generation_config(graph.assets),
        passes=tuple((r.name, r.rewrites) for r in graph.history),
    )
    with atomic_folder(Path(path), overwrite=overwrite, marker=MANIFEST) as work:
        write_onnx(lowered.surgeon, work, MODEL, WEIGHTS)
        for name, data in graph.assets.items():
            (work / name).write_bytes(data)
        manifest.write(work)
    return Engine(Path(path), Manifest.read(Path(path)))


def check_target(target: str) -> None:
    """Raises InputError for a target that this llmlab can't build for."""
    if target not in TARGETS:
        raise InputError(f"target is {target!r}; available: {', '.join(TARGETS)}")


def _size(name: str, given: int | None, default: int, most: int) -> int:
    if given is None:
        return default
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= most:
        raise InputError(f"{name} is {given!r}, expected an integer from 1 to {most}")
    return given
