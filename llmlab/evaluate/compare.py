"""`llmlab.compare`: engines side by side on the same data, each against the same reference."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmlab.build import build
from llmlab.errors import EngineError, InputError, LlmlabError
from llmlab.evaluate.accuracy import Evaluation, accuracy, precision
from llmlab.evaluate.comparison import Comparison, Row, names
from llmlab.evaluate.costs import Cost, check_price, measure_costs
from llmlab.evaluate.reference import Reference, load
from llmlab.evaluate.samples import Data
from llmlab.files import plain_name
from llmlab.graph.graph import Graph
from llmlab.progress import make_bar
from llmlab.quant.quantize import quantize
from llmlab.quant.recipe import Recipe
from llmlab.runtime.engine import Engine


def compare(
    engines: Sequence[Engine | str | Path | Mapping[str, Any] | Recipe] | Mapping[str, Any],
    data: Data | None = None,
    *,
    graph: Graph | None = None,
    calibration: Any = None,
    reference: Engine | Reference | str | Path | None = None,
    samples: int = 64,
    length: int = 256,
    seed: int = 0,
    threads: int | None = None,
    costs: bool = True,
    rounds: int = 2,
    price_per_hour: float | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Comparison:
    """Evaluate engines on the same data, each against the same reference.

    engines: engines or their folders; a mapping gives them names. With `graph`, a serving graph: recipes, by name or as
    `llmlab.quantize` takes them, whose engines are built in `folder` (default: one that is removed at the end), with
    `calibration` for those that need one; the graph as it is comes first.
    reference: the engine that others are held against; None: the first. rounds: how often costs are measured, the engines
    in turn, so that one disturbance doesn't hit one engine alone; of each number the best counts. All else is as for
    `llmlab.evaluate`.

    An engine that fails, or can't be built, has a row that says why. Raises InputError for data or recipes that can't be used.
    """
    if isinstance(engines, (str, Path, Engine, Recipe)) or not engines:
        raise InputError(
            "expected a list of engines, or with graph= of recipes, or a dict of them by name; at least one"
        )
    check_price(price_per_hour)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise InputError(f"rounds is {rounds!r}, expected an integer of at least 1")
    if isinstance(reference, Reference) and data is not None:
        raise InputError("this reference has its data already: give one of the two")
    with ExitStack() as stack:
        if graph is None:
            loaded: dict[str, Engine | LlmlabError] = dict(_opened(engines))
        else:
            place = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="llmlab-compare-")) if folder is None else folder
            )
            loaded = _built(engines, graph, calibration, place, seed, progress)
        if not isinstance(reference, Reference):
            first = next(iter(loaded.values()))
            assert isinstance(first, Engine)
            reference = stack.enter_context(
                Reference(
                    first if reference is None else reference,
                    "tinychat" if data is None else data,
                    samples=samples,
                    length=length,
                    seed=seed,
                    threads=threads,
                    progress=progress,
                )
            )
        return _compare(loaded, reference, threads, costs, rounds, price_per_hour, progress)


def _opened(engines: Sequence[Any] | Mapping[str, Any]) -> dict[str, Engine]:
    if isinstance(engines, Mapping):
        return {str(name): load(engine) for name, engine in engines.items()}
    opened = [load(engine) for engine in engines]
    return dict(zip(names([engine.path.name for engine in opened]), opened, strict=True))


def _built(
    recipes: Sequence[Any] | Mapping[str, Any], graph: Graph, calibration: Any, folder: Path, seed: int, progress: bool
) -> dict[str, Engine | LlmlabError]:
    """An engine of the graph as it is, and one for each recipe, or why there is none. All recipes are read before the first
    is built."""
    if isinstance(recipes, Mapping):
        parsed = {str(name): Recipe.parse(recipe) for name, recipe in recipes.items()}
    else:
        found = [Recipe.parse(recipe) for recipe in recipes]
        parsed = dict(zip(names([recipe.name or "recipe" for recipe in found]), found, strict=True))
    wide = build(graph, folder / "as it is", overwrite=True)
    made: dict[str, Engine | LlmlabError] = {names([*parsed, wide.manifest.precision])[-1]: wide}
    bar, remove = make_bar(len(parsed), desc="building engines") if progress else (None, None)
    try:
        for number, (name, recipe) in enumerate(parsed.items(), 1):
            if bar is not None:
                bar.set_description_str(f"building {name}")
            try:
                quantized = quantize(graph, recipe, calibration if recipe.needs_calibration else None, seed=seed)
                made[name] = build(
                    quantized, folder / (name if plain_name(name) else f"recipe {number}"), overwrite=True
                )
            except LlmlabError as problem:
                made[name] = problem
            if bar is not None:
                bar.update(1)
    finally:
        if remove is not None:
            remove()
    return made


def _compare(
    given: Mapping[str, Engine | LlmlabError],
    reference: Reference,
    threads: int | None,
    costs: bool,
    rounds: int,
    price_per_hour: float | None,
    progress: bool,
) -> Comparison:
    rows = {name: Row(name, None, str(problem)) for name, problem in given.items()}
    engines = {name: engine for name, engine in given.items() if isinstance(engine, Engine)}
    for name, engine in engines.items():
        try:
            found = accuracy(
                engine, reference.samples, reference, seed=reference.seed, threads=threads, progress=progress
            )
            rows[name] = Row(name, Evaluation(name, engine.manifest.target, precision(engine), found))
        except EngineError as problem:
            rows[name] = Row(name, None, str(problem))
    measured: dict[str, Cost] = {}
    for turn in range(rounds if costs else 0):
        for name in list(engines)[:: -1 if turn % 2 else 1]:
            if rows[name].found is None:
                continue
            try:
                cost = measure_costs(engines[name], threads=threads, price_per_hour=price_per_hour)
                measured[name] = measured[name].better(cost) if name in measured else cost
            except EngineError as problem:
                rows[name] = replace(rows[name], problem=str(problem))
    for name, cost in measured.items():
        found_before = rows[name].found
        assert found_before is not None
        rows[name] = replace(rows[name], found=replace(found_before, cost=cost))
    label = next((n for n, e in engines.items() if e.path == reference.engine.path), reference.engine.path.name)
    return Comparison(label, tuple(rows.values()))
