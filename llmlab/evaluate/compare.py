"""`llmlab.compare`: engines side by side on the same data, each against the same reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llmlab.errors import EngineError, InputError
from llmlab.evaluate.accuracy import Evaluation, accuracy
from llmlab.evaluate.comparison import Comparison, Row, names
from llmlab.evaluate.costs import Cost, check_price, measure_costs
from llmlab.evaluate.reference import Reference, load
from llmlab.evaluate.samples import Data
from llmlab.runtime.engine import Engine


def compare(
    engines: Sequence[Engine | str | Path] | Mapping[str, Engine | str | Path],
    data: Data | None = None,
    *,
    reference: Engine | Reference | str | Path | None = None,
    samples: int = 64,
    length: int = 256,
    seed: int = 0,
    threads: int | None = None,
    costs: bool = True,
    rounds: int = 2,
    price_per_hour: float | None = None,
    progress: bool = True,
) -> Comparison:
    """Evaluate engines on the same data, each against the same reference.

    engines: engines or their folders; a mapping gives them names. reference: the engine that others are held against; None:
    the first. rounds: how often costs are measured, the engines in turn, so that one disturbance doesn't hit one engine
    alone; of each number the best counts. All else is as for `llmlab.evaluate`.

    An engine that fails has a row that says why. Raises InputError for data that can't be used.
    """
    if isinstance(engines, (str, Path, Engine)) or not engines:
        raise InputError("expected a list of engines, or a dict of them by name, at least one")
    check_price(price_per_hour)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise InputError(f"rounds is {rounds!r}, expected an integer of at least 1")
    if isinstance(engines, Mapping):
        loaded = {str(name): load(engine) for name, engine in engines.items()}
    else:
        opened = [load(engine) for engine in engines]
        loaded = dict(zip(names([engine.path.name for engine in opened]), opened, strict=True))
    if isinstance(reference, Reference):
        if data is not None:
            raise InputError("this reference has its data already: give one of the two")
        return _compare(loaded, reference, threads, costs, rounds, price_per_hour, progress)
    with Reference(
        next(iter(loaded.values())) if reference is None else reference,
        "tinychat" if data is None else data,
        samples=samples,
        length=length,
        seed=seed,
        threads=threads,
        progress=progress,
    ) as made:
        return _compare(loaded, made, threads, costs, rounds, price_per_hour, progress)


def _compare(
    engines: Mapping[str, Engine],
    reference: Reference,
    threads: int | None,
    costs: bool,
    rounds: int,
    price_per_hour: float | None,
    progress: bool,
) -> Comparison:
    rows: dict[str, Row] = {}
    for name, engine in engines.items():
        try:
            found = accuracy(
                engine, reference.samples, reference, seed=reference.seed, threads=threads, progress=progress
            )
            m = engine.manifest
            rows[name] = Row(name, Evaluation(name, m.target, m.precision, found))
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
    return Comparison(label, tuple(rows[name] for name in engines))
