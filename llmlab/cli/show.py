"""What the command line shows of checkpoints, graphs and engines: rich tables, or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmlab.errors import InputError

if TYPE_CHECKING:
    from llmlab.checkpoint import Checkpoint
    from llmlab.evaluate.layers.model import EngineLayers
    from llmlab.graph.graph import Graph
    from llmlab.graph.reports.diff import GraphDiff
    from llmlab.graph.reports.why import Why
    from llmlab.runtime.engine import Engine

_SAMPLING = ("temperature", "top_k", "top_p")


@contextmanager
def working(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner on a terminal's standard error while something takes long; yields a function that changes its text."""
    console = Console(stderr=True)
    with console.status(f"{escape(text)} …") as status:
        yield lambda new: status.update(f"{escape(new)} …")


def check_output(output: Path, *, force: bool) -> None:
    """Refuse an output that exists before the work is done rather than after it."""
    if output.is_dir() and any(output.iterdir()) and not force:
        raise InputError(
            f"{output} is not empty: choose another folder, or replace what llmlab wrote there with --force"
        )
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} exists and is not a folder: choose another name")


def open_graph(source: str, weights_from: Path | None = None) -> Graph | None:
    """The graph in folder `source`, or None if there is none; `weights_from` as for `Graph.load`. Raises InputError for an engine folder."""
    from llmlab.graph.graph import Graph

    folder = Path(source).expanduser()
    if (folder / "manifest.json").is_file():
        raise InputError(f"{source} is an engine already: give a checkpoint or a graph folder")
    return Graph.load(folder, weights_from=weights_from) if (folder / "graph.json").is_file() else None


def graph_folder(path: str, weights_from: Path | None) -> Graph:
    """The graph in folder `path`. Raises InputError where there is none."""
    if (graph := open_graph(path, weights_from)) is None:
        raise InputError(f"{path} holds no graph: `llmlab export` and `llmlab optimize` write one")
    return graph


def check_one_of(options: dict[str, object]) -> None:
    """Refuse several of some options that exclude each other; those that aren't given are None."""
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} exclude each other: give one of them")


def panel(
    path: str, page: Path | None, *, weights_from: Path | None, threads: int | None, layers: bool, as_json: bool
) -> None:
    """The layers of an engine in a terminal, and a panel of an engine or a graph as a page."""
    from llmlab.evaluate.layers.measure import layers as layers_of
    from llmlab.runtime.manifest import MANIFEST
    from llmlab.widgets.inspect import inspect

    is_engine = (Path(path).expanduser() / MANIFEST).is_file()
    if layers and not is_engine:
        raise InputError(f"{path} holds no engine: `llmlab build` writes one")
    seen = layers_of(path, threads=threads) if is_engine else None
    if page is not None:
        inspect(seen or graph_folder(path, weights_from)).save(page)
    if layers and seen is not None:
        found(seen, as_json=as_json)
    elif not as_json:
        Console().print(f"wrote {page}", markup=False, highlight=False)


def found(answer: GraphDiff | Why | EngineLayers, *, as_json: bool) -> None:
    """What was asked about a graph."""
    if as_json:
        _print_json(answer.to_dict())
    else:
        Console().print(answer)


def passes(source: str, *, config: Path | None, weights_from: Path | None, threads: int | None, as_json: bool) -> None:
    """What each pass is good for on the model `source`, measured."""
    from rich.progress import Progress

    from llmlab.ablation import Ablation, measure
    from llmlab.graph.export import export

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"opening {escape(source)}", total=None)
        graph = open_graph(source, weights_from) or export(source, config=config, progress=False)
        rows = []
        for row, total in measure(graph, threads=threads):
            rows.append(row)
            progress.update(bar, description=f"without {escape(row.name)}", completed=len(rows), total=total)
    result = Ablation(source, tuple(rows))
    if as_json:
        _print_json(result.to_dict())
    else:
        Console().print(result)


def anything(path: str, *, config: Path | None, weights_from: Path | None, as_json: bool) -> None:
    """Show what lies at `path`, whatever it is; `config` is an ONNX file's config.json, `weights_from` as for `Graph.load`."""
    folder = Path(path).expanduser()
    if (folder / "manifest.json").is_file():
        from llmlab.runtime.engine import Engine

        engine(Engine.load(folder), as_json=as_json)
    elif path.endswith((".onnx", ".nemo")):
        from llmlab.graph.export import export

        graph(export(path, config=config), folder, as_json=as_json)
    elif (found := open_graph(path, weights_from)) is not None:
        graph(found, folder, as_json=as_json)
    else:
        from llmlab.checkpoint import Checkpoint, resolve

        checkpoint(Checkpoint(resolve(path)), as_json=as_json)


def architectures(*, as_json: bool) -> None:
    """The model families that were measured against transformers, and what else was tried."""
    from llmlab.graph.architectures import measured

    found = measured()
    if as_json:
        _print_json({"kind": "architectures", **found})
        return
    console = Console()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    table = Table("family", "what there is to get right", "error", "a mistake makes", title="Held against transformers")
    for family in found["families"]:
        table.add_row(
            escape(family["family"]), escape(family["features"]), f"{family['error']:.0e}", f"{family['control']:.2f}"
        )
    console.print(table)
    console.print(f"Worst relative error of the logits, ragged batches with a preemption; {found['date']}, {versions}")
    if found["others"]:
        others = Table("architecture", "", title="Others that were tried")
        for other in found["others"]:
            outcome = f"right, error {other['error']:.0e}" if "error" in other else f"refused: {other['refused']}"
            others.add_row(escape(other["model_type"]), escape(outcome))
        console.print(others)


def graph(found: Graph, folder: Path, *, as_json: bool) -> None:
    """Its passes with what each did, its operators, its inputs and outputs."""
    if as_json:
        _print_json({"kind": "graph", "path": str(folder)} | {"graph": found.to_dict()})
        return
    console = Console()
    if found.history:
        console.print(found.history)
    ports = Table("", "tensor", "type", "shape", title="Inputs and outputs")
    for side, tensors in (("in", found.surgeon.inputs), ("out", found.surgeon.outputs)):
        for tensor in tensors:
            ports.add_row(side, escape(tensor.name), str(tensor.dtype), escape(str(tensor.shape)))
    console.print(ports)
    operators = Table("operator", "nodes", title="Operators")
    for name, count in found.op_counts().items():
        operators.add_row(name, str(count))
    console.print(operators)
    console.print(
        f"{found.kind} graph of a {escape(found.config.model_type)} model, {len(found.surgeon.nodes)} nodes, "
        f"{found.weight_bytes / 1e6:.1f} MB of weights: {escape(str(folder))}"
    )


def quantized(found: Graph, folder: Path, *, as_json: bool) -> None:
    """What each projection got."""
    report = found.history[-1]
    if as_json:
        _print_json({"kind": "quantization", "path": str(folder), **report.to_dict()})
        return
    console = Console()
    console.print(report)
    console.print(f"{found.weight_bytes / 1e6:.1f} MB of weights: {escape(str(folder))}")


def checkpoint(found: Checkpoint, *, as_json: bool) -> None:
    """Its configuration and its tensors."""
    config = found.config
    facts: dict[str, Any] = {
        name: getattr(config, name)
        for name in ("model_type", "vocab_size", "hidden_size", "num_layers", "num_heads", "max_position_embeddings")
    }
    sizes = {name: math.prod(tensor.shape) for name, tensor in found.weights.items()}
    facts |= {
        "eos_token_ids": list(config.eos_token_ids),
        "parameters": sum(sizes.values()),
        "files": sorted(found.assets),
    }
    if as_json:
        tensors = {name: {"dtype": str(t.dtype), "shape": list(t.shape)} for name, t in found.weights.items()}
        _print_json({"kind": "checkpoint", "path": str(found.folder), **facts, "tensors": tensors})
        return
    console = Console()
    console.print(_facts(f"Checkpoint {found.folder}", facts))
    table = Table("tensor", "type", "shape", title=f"{len(sizes)} tensors, largest first")
    for name in sorted(sizes, key=lambda name: -sizes[name])[:12]:
        tensor = found.weights[name]
        table.add_row(escape(name), str(tensor.dtype), escape(str(list(tensor.shape))))
    console.print(table)


def engine(found: Engine, *, as_json: bool) -> None:
    """Its manifest and the sizes of its files."""
    manifest = found.manifest
    if as_json:
        _print_json({"kind": "engine", "path": str(found.path), "manifest": manifest.to_dict()})
        return
    config = manifest.config
    sampling = [
        f"{name} {manifest.generation[name]}" for name in _SAMPLING if manifest.generation.get(name) is not None
    ]
    if not manifest.generation.get("do_sample"):
        sampling = ["greedy"]
    console = Console()
    facts = {
        "model": f"{config.model_type}, {config.num_layers} layers, vocabulary {config.vocab_size:,}",
        "target": f"{manifest.target}, {manifest.precision}",
        **({"quantized": manifest.recipe.get("name") or "as its manifest says"} if manifest.recipe else {}),
        **({"products": str(manifest.products)} if manifest.products else {}),
        "limits": f"{manifest.limits.max_seq_len:,} tokens a sequence, {manifest.limits.max_tokens_per_step:,} a step",
        "KV cache": str(manifest.kv),
        "end of sequence": manifest.eos_token_ids or "none",
        "sampling": ", ".join(sampling) or "temperature 1",
        "passes": ", ".join(f"{name} {count}" for name, count in manifest.passes if count),
    }
    console.print(_facts(f"Engine {found.path}", facts))
    table = Table("file", "bytes", title=f"{found.size / 1e6:.1f} MB in {len(manifest.files)} files")
    for name, entry in manifest.files.items():
        table.add_row(escape(name), f"{entry['size']:,}")
    console.print(table)


def _facts(title: str, facts: dict[str, Any]) -> Table:
    table = Table("", "", title=escape(title), show_header=False)
    for name, value in facts.items():
        if isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        table.add_row(name.replace("_", " "), escape(f"{value:,}" if type(value) is int else str(value)))
    return table


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False, default=str))
