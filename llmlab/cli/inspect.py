"""`llmlab inspect`, the verb with the most to show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmlab.cli import options
from llmlab.errors import InputError


def inspect(
    path: Annotated[
        str | None,
        typer.Argument(help="Checkpoint folder, `tinychat`, `.onnx` file, graph or engine folder.", show_default=False),
    ] = None,
    config: options.Config = None,
    why: Annotated[
        str | None,
        typer.Option(metavar="PLACE", help="What each pass did at a part of the graph, such as `layers.0.self_attn`."),
    ] = None,
    diff: Annotated[
        str | None, typer.Option(metavar="GRAPH", help="What is different in another graph folder, node by node.")
    ] = None,
    passes: Annotated[
        bool, typer.Option("--passes", help="Leave out each pass in turn, and measure what it was good for.")
    ] = False,
    architectures: Annotated[
        bool, typer.Option("--architectures", help="Show the model families that were measured against transformers.")
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="What an engine runs, layer by layer, and how long each takes.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="PAGE",
            help="Write what a notebook would show of a graph or an engine as a page.",
            show_default=False,
        ),
    ] = None,
    weights_from: options.WeightsFrom = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Show what a checkpoint, a graph or an engine holds; of a graph, also what its passes did, and why or why not.

    `--why` names the passes that fired at a place, what they added and removed there, and what held the others back.
    A place is a part of a module's path, or the end of a node's
    whole name, such as `self_attn/PagedAttention`.

    `--diff` compares two graphs of any kind: nodes by name, what changed at each, and weights. Layers in which the
    same changed are shown as one.

    `--passes` takes a checkpoint, a plain graph or nothing (tinychat), builds an engine with all passes and one without
    each of them, and measures their steps in turn. A pass without which the model is refused is *required*.

    `--layers` runs an engine's steps and says which nodes of the serving graph each layer computes, in which precision, and how
    long it takes. `--html` writes that, or a graph with its layers and blocks, as a page of its own.

    **Examples:** `llmlab inspect engines/tinychat`, `llmlab inspect engines/tinychat --layers --html page.html`, `llmlab inspect graphs/serving --why layers.0.self_attn`,
    `llmlab inspect graphs/plain --diff graphs/serving`, `llmlab inspect --passes tinychat`, `llmlab inspect --architectures`
    """
    from llmlab.cli import show

    show.check_one_of(
        {
            "--why": why,
            "--diff": diff,
            "--passes": passes or None,
            "--architectures": architectures or None,
            "--layers": layers or None,
        }
    )
    if passes:
        show.passes(path or "tinychat", config=config, weights_from=weights_from, threads=threads, as_json=as_json)
    elif architectures and path is not None:
        raise InputError("--architectures shows what was measured and takes no path")
    elif architectures:
        show.architectures(as_json=as_json)
    elif path is None:
        raise InputError("give a checkpoint, a graph or an engine to look at; see llmlab inspect --help")
    elif layers or html is not None:
        show.panel(path, html, weights_from=weights_from, threads=threads, layers=layers, as_json=as_json)
    elif why is not None:
        show.found(show.graph_folder(path, weights_from).why(why), as_json=as_json)
    elif diff is not None:
        before, after = (show.graph_folder(p, weights_from) for p in (path, diff))
        show.found(before.diff(after), as_json=as_json)
    else:
        show.anything(path, config=config, weights_from=weights_from, as_json=as_json)
