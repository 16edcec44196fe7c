"""Checkpoint, torch module or ONNX file → the plain graph: what torch writes, stateless, over padded `[batch, sequence]` tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llmlab.checkpoint import Checkpoint, generation_config, read_assets, resolve
from llmlab.config import ModelConfig
from llmlab.errors import InputError, UnsupportedModelError, require
from llmlab.files import read_json
from llmlab.graph.graph import MANIFEST, Graph
from llmlab.graph.sources.from_onnx import ONNX_SUFFIX, open_onnx
from llmlab.graph.sources.nemo.checkpoint import NemoCheckpoint, is_nemo
from llmlab.graph.sources.position_tables import check_position_tables
from llmlab.graph.sources.rope_config import freeze_rope, rope_limit
from llmlab.graph.sources.trace import LOADING, STAGES, quiet, reason, trace
from llmlab.graph.sources.weights import locate_weights
from llmlab.progress import stage_bar
from llmlab.provenance import step

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    import torch

_PLACES = "a checkpoint folder, a hub id, a model that ships, an .onnx file or a .nemo archive"


def export(
    source: str | Path | torch.nn.Module,
    *,
    config: Mapping[str, Any] | ModelConfig | str | Path | None = None,
    tokenizer: str | Path | None = None,
    trust_remote_code: bool = False,
    max_seq_len: int | None = None,
    progress: bool = True,
) -> Graph:
    """Export a model to a plain ONNX graph (opset 23, float32) with inputs `input_ids`, `position_ids` i64 [batch, sequence].

    source: a checkpoint folder, a hub id, the name of a model that ships (`"tinychat"`), a `.nemo` archive of a GPT model
        (or the folder it was unpacked into), a torch module whose `forward(input_ids, position_ids)` returns logits
        [batch, sequence, vocab] (or an object with `.logits`), or an ONNX file (`"model.onnx"`, see `open_onnx`), which
        needs no torch.
    config: for a torch module, its configuration (Hugging Face field names), unless the module has a `.config`; for an
        ONNX file the same or the path of a config.json, unless that lies beside it.
    tokenizer: for a torch module, what brings its tokenizer files: a folder, a hub id or a model that ships. Without
        one, the engine works on token ids alone.
    trust_remote_code: run modelling code that the checkpoint brings. Off: such a checkpoint is refused.
    max_seq_len: longest sequence that the graph is for, in tokens; None for the longest that the model takes. Models
        with longrope (phi3) have two sets of frequencies, one for sequences up to `original_max_position_embeddings` and
        one for longer ones, and a cache of keys can't change between them: None, or anything up to that length, takes the
        short set and limits the graph to that length; more takes the long set for every position.
    progress: a bar over what torch does, where someone can see it.

    Weights keep their checkpoint names (a NeMo archive's get those of the Hugging Face model that computes the same) and
    stay where they are: memory maps into the files, in the type they are stored in, with a Cast to float32 behind those
    stored narrower.
    """
    given = {"source": source, "config": config, "tokenizer": tokenizer}
    given |= {"trust_remote_code": trust_remote_code, "max_seq_len": max_seq_len}
    graph = _export(source, config, tokenizer, trust_remote_code, max_seq_len, progress)
    graph.steps = (step("export", given, _DEFAULTS),)
    return graph


_DEFAULTS = {"config": None, "tokenizer": None, "trust_remote_code": False, "max_seq_len": None}


def _export(
    source: str | Path | torch.nn.Module,
    config: Mapping[str, Any] | ModelConfig | str | Path | None,
    tokenizer: str | Path | None,
    trust_remote_code: bool,
    max_seq_len: int | None,
    progress: bool,
) -> Graph:
    if isinstance(source, (str, Path)) and str(source).endswith(ONNX_SUFFIX):
        if tokenizer is not None:
            raise InputError("tokenizer goes with a torch module; an ONNX file has its tokenizer.json beside it")
        return open_onnx(Path(source).expanduser(), config, max_seq_len=max_seq_len)
    if isinstance(source, (str, Path)) and config is not None:
        raise InputError("config goes with a torch module or an ONNX file; a checkpoint brings its own config.json")
    if isinstance(source, (str, Path)) and tokenizer is not None:
        raise InputError("tokenizer goes with a torch module; a checkpoint brings its own tokenizer.json")
    name = Path(source).name if isinstance(source, (str, Path)) else type(source).__name__
    with stage_bar(f"exporting {name}", STAGES, progress) as begins:
        if isinstance(source, (str, Path)):
            return _export_checkpoint(source, trust_remote_code, max_seq_len, begins)
        return _export_module(source, config, tokenizer, max_seq_len, begins)


def _export_module(
    source: torch.nn.Module,
    config: Mapping[str, Any] | ModelConfig | str | Path | None,
    tokenizer: str | Path | None,
    max_seq_len: int | None,
    begins: Callable[[str], None],
) -> Graph:
    begins(LOADING)
    torch = _require_torch()
    if not isinstance(source, torch.nn.Module):
        raise InputError(f"source is {source!r}; expected a torch module, or where a model lies: {_PLACES}")
    model_config = _module_config(source, config).limited(max_seq_len)
    longest = model_config.max_position_embeddings
    assets = {} if tokenizer is None else _tokenizer_files(tokenizer)
    surgeon = trace(source.eval(), {}, longest, begins)
    check_position_tables(surgeon, longest)
    return Graph(surgeon, model_config, assets)


def _export_checkpoint(
    source: str | Path, trust_remote_code: bool, max_seq_len: int | None, begins: Callable[[str], None]
) -> Graph:
    path = Path(source).expanduser()
    if (path / MANIFEST).is_file():
        raise InputError(f"{source} is a graph already: open it with llmlab.Graph.load")
    with closing(NemoCheckpoint(path) if is_nemo(path) else Checkpoint(resolve(source))) as checkpoint:
        generation_config(checkpoint.assets)
        begins(LOADING)
        _require_torch()  # which takes seconds: what is wrong with the checkpoint was said before
        limited = checkpoint.config.limited(max_seq_len)
        limit = rope_limit(limited.raw, max_seq_len)
        if limit is not None and limit < limited.max_position_embeddings:
            limited = limited.limited(limit)
        surgeon = _trace_checkpoint(checkpoint, trust_remote_code, limited.max_position_embeddings, begins)
        return Graph(surgeon, limited, checkpoint.assets)


def _require_torch() -> ModuleType:
    require("onnxscript", "export")
    return require("torch", "export")


def _tokenizer_files(source: str | Path) -> dict[str, bytes]:
    folder = resolve(source)
    assets = read_assets(folder)
    if "tokenizer.json" not in assets:
        raise InputError(f"{folder}: no tokenizer.json there; expected a folder that holds a tokenizer")
    return assets


def _module_config(module: torch.nn.Module, config: Mapping[str, Any] | ModelConfig | str | Path | None) -> ModelConfig:
    if isinstance(config, ModelConfig):
        return config
    if isinstance(config, (str, Path)):
        return ModelConfig.from_hf(read_json(Path(config).expanduser(), InputError), where=str(config))
    if config is None and hasattr(module, "config"):
        config = module.config if isinstance(module.config, Mapping) else module.config.to_dict()
    if config is None:
        raise InputError(f"{type(module).__name__} has no .config; pass config={{'model_type': …, 'vocab_size': …, …}}")
    return ModelConfig.from_hf(config)


def _trace_checkpoint(
    checkpoint: Checkpoint, trust_remote_code: bool, longest: int, begins: Callable[[str], None]
) -> gs.Graph:
    """A checkpoint's graph, its attention as one call if the model and torch's exporter know it so, else in primitives."""
    _refuse_unreadable(checkpoint, trust_remote_code)
    for attention in ("sdpa", "eager"):
        try:
            model = _empty_model(checkpoint, trust_remote_code, attention, longest)
            return trace(model, locate_weights(model, checkpoint), longest, begins)
        except UnsupportedModelError as problem:
            refusal = problem
    raise refusal


def _refuse_unreadable(checkpoint: Checkpoint, trust_remote_code: bool) -> None:
    raw = checkpoint.config.raw
    if raw.get("quantization_config"):
        given = raw["quantization_config"]
        method = given.get("quant_method", "an unknown method") if isinstance(given, Mapping) else repr(given)
        raise UnsupportedModelError(
            f"{checkpoint.folder}: quantized with {method}; export the full-precision checkpoint and use llmlab to quantize"
        )
    if "auto_map" in raw and not trust_remote_code:
        raise UnsupportedModelError(
            f"{checkpoint.folder}: brings its own code; pass trust_remote_code=True if you trust it"
        )


def _empty_model(checkpoint: Checkpoint, trust_remote_code: bool, attention: str, longest: int) -> torch.nn.Module:
    """The transformers model of a checkpoint, its parameters allocated but never written: no memory is committed."""
    torch = require("torch", "export")
    transformers = require("transformers", "export")
    from transformers.initialization import no_init_weights

    try:
        with quiet(), no_init_weights():
            if isinstance(checkpoint, NemoCheckpoint):
                config = transformers.AutoConfig.for_model(**checkpoint.config.raw)
            else:
                config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
            freeze_rope(config, longest)
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=trust_remote_code
            )
    except Exception as problem:  # transformers raises whatever its model code raises
        raise UnsupportedModelError(
            f"{checkpoint.folder}: transformers can't make a '{checkpoint.config.model_type}' model of it: {reason(problem)}"
        ) from problem
    model.tie_weights()
    return model.eval()
