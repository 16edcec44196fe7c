"""`llmlab quantize`, and the way to a serving graph that it shares with `llmlab build`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmlab.cli import options
from llmlab.cli.one_line import leaving_at_once

if TYPE_CHECKING:
    from llmlab.graph.graph import Graph


def serving_graph(
    source: str,
    now: Callable[[str], None],
    *,
    config: Path | None,
    weights_from: Path | None,
    trust_remote_code: bool,
    max_seq_len: int | None = None,
) -> Graph:
    """The serving graph of `source`, exported and optimized as far as it has to be; `now` is told what is going on."""
    import llmlab as ll
    from llmlab.cli import show

    graph = show.open_graph(source, weights_from)
    if graph is None:
        now(f"exporting {source}")
        with leaving_at_once():
            graph = ll.export(
                source, config=config, trust_remote_code=trust_remote_code, max_seq_len=max_seq_len, progress=False
            )
    if graph.kind == "plain":
        now("optimizing the graph")
        graph = ll.optimize(graph)
    return graph


def quantize(
    source: Annotated[str, typer.Argument(help="What `llmlab export` takes, or a graph folder.")],
    recipe: options.Recipe,
    output: options.Output,
    calibration: options.Calibration = None,
    cache: options.Cache = None,
    seed: Annotated[int, typer.Option(help="Of what a method draws at random.")] = 0,
    config: options.Config = None,
    weights_from: options.WeightsFrom = None,
    trust_remote_code: options.TrustRemoteCode = False,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Quantize a model's weights, activations and KV cache, and show what each projection got.

    Next: `llmlab build`.

    **Examples:** `llmlab quantize tinychat int4_rtn -o graphs/int4`,
    `llmlab quantize graphs/serving int4_awq_g64+kv_int8 --calibration chats.jsonl --cache work -o graphs/int4`
    """
    import llmlab as ll
    from llmlab.cli import show

    show.check_output(output, force=force)
    wanted = ll.Recipe.parse(recipe)
    with show.working("opening the source") as now:
        graph = serving_graph(
            source, now, config=config, weights_from=weights_from, trust_remote_code=trust_remote_code
        )
    graph = ll.quantize(graph, wanted, calibration, seed=seed, cache=cache)  # its bars go where the spinner was
    with show.working("rounding and writing the weights"):
        graph.save(output, overwrite=force)
    show.quantized(graph, output, as_json=as_json)
