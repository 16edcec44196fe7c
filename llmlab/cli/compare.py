"""`llmlab compare`: engines side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llmlab.cli import options


def compare(
    engines: Annotated[
        list[str],
        typer.Argument(help="Engine folders; or with --recipes a checkpoint or a graph folder.", metavar="ENGINE..."),
    ],
    recipes: Annotated[
        str | None,
        typer.Option(help="Build engines by these recipes, with commas between them, beside the model as it is."),
    ] = None,
    calibration: options.Calibration = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="With --recipes: keep the engines in this folder.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Engine folder that the others are held against.", show_default="the first"),
    ] = None,
    data: Annotated[
        str, typer.Option(help="Held-out data: `tinychat` (its chats), a `.jsonl` or a `.txt` file.")
    ] = "tinychat",
    samples: Annotated[int, typer.Option(min=1, help="Most sequences.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="Most tokens of each.")] = 256,
    costs: Annotated[bool, typer.Option(help="Measure size, memory, load time, speed and energy as well.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Measure costs this often, in turn; the best counts.")] = 2,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Of this machine, for the price of a million tokens.")
    ] = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Hold engines against a reference: KL divergence, agreement, exact match, each with its interval; and what they cost.

    A row that another one beats in accuracy, speed and size is marked with ×.

    **Examples:** `llmlab compare engines/float32 engines/int8 engines/int4`,
    `llmlab compare engines/int8 --reference engines/float32 --data questions.jsonl --price-per-hour 0.40`,
    `llmlab compare tinychat --recipes int8,int4_rtn,int4_awq`
    """
    import llmlab as ll
    from llmlab.cli import show
    from llmlab.cli.quantize import serving_graph
    from llmlab.errors import InputError

    graph, given = None, engines
    if recipes is not None:
        if len(engines) != 1:
            raise InputError(f"--recipes takes one checkpoint or graph folder, got {len(engines)}")
        given = [str(recipe) for recipe in recipes.split(",")]
        for recipe in given:  # before a long export
            ll.Recipe.parse(recipe)
        with show.working("opening the source") as now:
            graph = serving_graph(engines[0], now, config=None, weights_from=None, trust_remote_code=False)
    elif output is not None or calibration is not None:
        raise InputError("--output and --calibration go with --recipes")
    found = ll.compare(
        given,
        data,
        graph=graph,
        calibration=calibration,
        folder=output,
        reference=reference,
        samples=samples,
        length=length,
        threads=threads,
        costs=costs,
        rounds=rounds,
        price_per_hour=price_per_hour,
    )
    if as_json:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    Console().print(found)
