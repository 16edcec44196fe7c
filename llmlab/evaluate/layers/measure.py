"""`llmlab.layers`: what a compiler made of a serving graph, and how long each part takes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from llmlab.errors import EngineError
from llmlab.evaluate.layers.model import EngineLayers
from llmlab.evaluate.layers.steps import Steps
from llmlab.files import read_json
from llmlab.graph.lower.origins import Origins
from llmlab.runtime.batch import EngineLimits
from llmlab.runtime.engine import Engine
from llmlab.runtime.manifest import ORIGINS


def layers(
    engine: Engine | str | Path,
    *,
    context: int | None = None,
    prompt: int | None = None,
    batch: int = 1,
    repeat: int = 20,
    threads: int | None = None,
    stop: threading.Event | None = None,
) -> EngineLayers:
    """What an engine runs in a step, layer by layer: the serving graph's nodes that each computes, precision, time and bytes.

    context: tokens that a sequence has before the one that it decodes (default: 128, or what fits). prompt: tokens of a prompt
        that is read whole (default: the same). batch: sequences that decode together. repeat: runs of each step; a layer's time
        is the middle one of them, which a machine that is busy with other things disturbs least. threads: of an ONNX Runtime engine (default: physical cores). stop: ends it early, with KeyboardInterrupt.
    Raises InputError for numbers that don't fit, EngineError for an engine that doesn't say what it was made of.
    """
    opened = engine if isinstance(engine, Engine) else Engine.load(engine)
    found = read_origins(opened)
    limits = opened.manifest.limits
    sizes = EngineLimits(0, limits.max_seq_len, limits.max_tokens_per_step, 0, 0)
    steps = Steps.fit(sizes, context, prompt, batch, repeat)
    if opened.manifest.target == "onnxruntime":
        from llmlab.evaluate.layers.onnxruntime import read_layers

        return read_layers(opened, found, steps, threads, stop)
    from llmlab.evaluate.layers.tensorrt import read_layers as read_plans

    return read_plans(opened, found, steps)


def read_origins(engine: Engine) -> dict[str, Any]:
    """What the build wrote: Origins by model; of TensorRT the names of each part's nodes too, as `parts`. Raises EngineError where it didn't."""
    path = engine.path / ORIGINS
    if ORIGINS not in engine.manifest.files:
        raise EngineError(
            f"{engine.path}: doesn't say which nodes it was made of: an older llmlab built it, build it again"
        )
    try:
        data = {**read_json(path, EngineError)}
        parts = [[str(name) for name in part] for part in data.pop("parts", ())]
        found: dict[str, Any] = {str(name): Origins.from_dict(entry) for name, entry in data.items()}
        return {**found, "parts": parts} if engine.manifest.compiled is not None else found
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise EngineError(f"{path}: altered, build the engine again") from problem
