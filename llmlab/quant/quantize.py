"""A serving graph → the same graph with quantized weights, activations and KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.errors import InputError
from llmlab.files import sha256
from llmlab.graph.convert import PRECISIONS, convert
from llmlab.graph.edit import Editor
from llmlab.graph.graph import Graph
from llmlab.graph.reports.quantization import QuantizationReport, QuantizedProjection
from llmlab.graph.reports.report import PassReport
from llmlab.graph.rewrite import Match, Pass, run_pass
from llmlab.provenance import Step, described, step
from llmlab.quant.methods import Job, Work, run_methods
from llmlab.quant.place import place_activation, place_weight, take_apart
from llmlab.quant.projections import ROLES, Projection, matches, projections, select
from llmlab.quant.recipe import Recipe
from llmlab.quant.rounding import Rounding


def quantize(
    graph: Graph,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    calibration: Any = None,
    *,
    seed: int = 0,
    cache: str | Path | None = None,
) -> Graph:
    """The serving graph quantized as `recipe` says; the input is not changed.

    recipe: a name (`int4_rtn`, `int8_dynamic+kv_int8`; `llmlab.Recipe` lists them), a dict, the path of a YAML file or a Recipe.
    calibration: what the model is shown where the recipe needs to see activations: a list of texts, of chats or of sequences of token ids, or
        the path of a .jsonl file (`quant/data.py`); up to 128 samples of up to 512 tokens. None: the calibration split of the zoo, for tinychat.
    seed: of whatever is drawn at random.
    cache: a folder where a calibration keeps what it finds: an interrupted one goes on where it was.
    The last report in `history` says what each projection got, and which stayed wide and why. Weights that are rounded to nearest
    are computed when the graph is saved or built, one at a time. Raises InputError that says what doesn't fit: a graph that isn't a
    serving graph or is quantized already, a pattern that matches nothing, a group size that doesn't divide a weight, a calibration
    that is missing; later, while weights are written, for a weight that holds a NaN.
    """
    recipe = Recipe.parse(recipe)
    if not isinstance(graph, Graph) or graph.kind != "serving":
        raise InputError("expected a serving graph: pass what llmlab.optimize returned")
    result = graph.copy()
    if recipe.precision is not None:
        kinds = {np.dtype(t.dtype) for n in result.surgeon.nodes if n.op == "PagedAttention" for t in n.outputs[:1]}
        if kinds != {PRECISIONS[recipe.precision]}:
            result = convert(result, recipe.precision)
    if not any((recipe.weights, recipe.activations, recipe.kv_cache, recipe.layers, recipe.precision)):
        raise InputError("the recipe says nothing: name weights, activations, a KV cache, layers or a precision")
    kept = None if cache is None else Path(cache)
    rule = _Quantize(Work(result, graph.copy(), recipe, plan(result, recipe), calibration, seed, kept))
    run_pass(rule, result)
    result.history[-1] = _report(result.history[-1], recipe, rule.rows)
    result.steps = (*graph.steps, _step(recipe, calibration, seed))
    return result


def _step(recipe: Recipe, calibration: Any, seed: int) -> Step:
    """The record of a call of `quantize`: the recipe by its name if that says it all; texts by their hash alone."""
    given: dict[str, Any] = {"recipe": recipe.to_dict(), "seed": seed}
    with suppress(InputError):
        if recipe.name and Recipe.parse(recipe.name) == recipe:
            given["recipe"] = recipe.name
    missing, notes = {}, []
    if isinstance(calibration, (str, Path)):
        given["calibration"] = calibration
        if Path(calibration).is_file():
            notes = [f"calibration: a file of sha256 {sha256(Path(calibration))}"]
    elif calibration is not None:
        missing["calibration"] = described(calibration)
    made = step("quantize", given, {"seed": 0}, *notes)
    return replace(made, missing=missing)


def plan(graph: Graph, recipe: Recipe) -> list[Job]:
    """What `recipe` does to each projection of a graph. Raises InputError for a pattern that matches nothing."""
    found = projections(graph)
    for pattern in (*(o.pattern for o in recipe.layers), *(k for k in recipe.keep if k not in ROLES)):
        select(found, pattern)
    return [_job(projection, recipe) for projection in found]


def _job(projection: Projection, recipe: Recipe) -> Job:
    overrides = [o for o in recipe.layers if matches(projection, o.pattern)]
    kept = [k for k in recipe.keep if matches(projection, k)]
    if overrides:
        job = Job(projection, overrides[-1].weights, overrides[-1].activations, f"layers: {overrides[-1].pattern}")
    elif kept:
        job = Job(projection, reason=f"keep: {kept[0]}")
    else:
        job = Job(projection, recipe.weights, recipe.activations, "the recipe leaves weights wide")
    if job.weights is not None and projection.is_quantized:
        raise InputError(f"{job.name} is quantized already: start from the graph that llmlab.optimize returned")
    if projection.role in ("embedding", "expert_up", "expert_down"):
        job.activations = None  # what an embedding reads are numbers of tokens; experts' are inside their node
    return job


class _Quantize(Pass):
    """Weights and activations → numbers of few bits and their scales."""

    name = "quantize"

    def __init__(self, work: Work) -> None:
        self.work = work
        self.rows: list[QuantizedProjection] = []
        self._done: set[int] = set()

    def find(self, edit: Editor) -> Iterator[Match]:
        work = self.work
        merged: dict[int, list[Job]] = {}
        for job in work.jobs:
            merged.setdefault(id(job.projection.node), []).append(job)
        for jobs in merged.values():
            if len({job.activations for job in jobs}) > 1 and jobs[0].projection.node.op == "MatMul":
                take_apart(edit, jobs[0].projection.node, [job.name for job in jobs])
        work.refresh()
        run_methods(work)
        for job in work.jobs:
            yield Match(node=job.projection.node, job=job)

    def check(self, edit: Editor, match: Match) -> str | None:
        job: Job = match.job
        if job.weights is not None or job.activations is not None:
            return None
        size = stored_bytes(job.projection.weight)
        self.rows.append(QuantizedProjection(job.name, job.projection.role, "", "", size, size, job.reason))
        return f"{job.name} stays wide ({job.reason})"

    def rewrite(self, edit: Editor, match: Match) -> None:
        job: Job = match.job
        projection = job.projection
        before = after = stored_bytes(projection.weight)
        if job.weights is not None:
            rounded = self.work.rounded.get(job.name)
            wide = place_weight(edit, projection, rounded or Rounding(projection, job.weights.grid))
            after = stored_bytes(wide)
        if job.activations is not None:
            place_activation(edit, projection, job.activations, self.work.scales.get(job.name))
        said = (str(job.weights or ""), str(job.activations or ""))
        self.rows.append(QuantizedProjection(job.name, projection.role, *said, before, after))


def stored_bytes(weight: gs.Tensor) -> int:
    """Bytes of all constants that a weight is made of."""
    if isinstance(weight, gs.Constant):
        return int(weight._values.nbytes)
    return sum(stored_bytes(t) for t in weight.inputs[0].inputs if not (isinstance(t, gs.Variable) and t.is_empty()))


def _report(report: PassReport, recipe: Recipe, rows: list[QuantizedProjection]) -> QuantizationReport:
    given = {f.name: getattr(report, f.name) for f in fields(PassReport)}
    return QuantizationReport(**{**given, "summary": str(recipe)}, recipe=recipe.to_dict(), projections=tuple(rows))
