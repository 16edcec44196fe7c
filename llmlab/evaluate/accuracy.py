"""`llmlab.evaluate`: how far an engine's answers are from a reference's, how good they are, and what the engine costs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmlab.errors import InputError
from llmlab.evaluate.costs import Cost, measure_costs
from llmlab.evaluate.metrics import Estimate, divergence, first_difference, ratio, share, surprise
from llmlab.evaluate.reference import Reference, greedy, load, logits, opened, read
from llmlab.evaluate.samples import Data, Sample
from llmlab.quant.recipe import Recipe
from llmlab.runtime.engine import Engine
from llmlab.runtime.llm import LLM

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Accuracy:
    """Means over sequences, each with the interval that bootstrapping over sequences gives; None where it wasn't measured."""

    sequences: int
    tokens: int
    """Scored ones: those of answers, and of whole texts."""
    kl: Estimate | None = None
    """KL divergence from the reference's distribution, in nats a token."""
    top1: Estimate | None = None
    """Share of tokens for which both have the same most likely one."""
    bits_per_byte: Estimate | None = None
    """Of the data's own tokens, over the UTF-8 bytes of their text."""
    exact_match: dict[str, Estimate] = field(default_factory=dict)
    """Share of greedy answers that are the right one, by task, and over `all`."""
    same_answer: Estimate | None = None
    """Share of greedy answers that are the reference's, token by token."""
    first_difference: Estimate | None = None
    """Tokens of a greedy answer before the first that isn't the reference's; all of them where there is none."""

    def to_dict(self) -> dict[str, Any]:
        named = ("kl", "top1", "bits_per_byte", "same_answer", "first_difference")
        found = {name: getattr(self, name) for name in named}
        return {
            "sequences": self.sequences,
            "tokens": self.tokens,
            **{name: None if estimate is None else estimate.to_dict() for name, estimate in found.items()},
            "exact_match": {task: estimate.to_dict() for task, estimate in self.exact_match.items()},
        }


@dataclass(frozen=True)
class Evaluation:
    """One engine, measured. Shows itself as a table."""

    name: str
    target: str
    precision: str
    accuracy: Accuracy
    cost: Cost | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "evaluation",
            "name": self.name,
            "target": self.target,
            "precision": self.precision,
            "accuracy": self.accuracy.to_dict(),
            "cost": None if self.cost is None else self.cost.to_dict(),
        }

    def facts(self) -> dict[str, str]:
        """What there is to show, one line each, each with what it is of."""
        a = self.accuracy
        lines = {"engine": f"{self.target}, {self.precision}", "data": f"{a.sequences} sequences, {a.tokens:,} tokens"}
        if a.kl is not None and a.top1 is not None:
            lines["KL to reference"] = f"{a.kl.show('.3g')} nats a token"
            lines["same most likely token"] = a.top1.show(".1%")
        if a.bits_per_byte is not None:
            lines["bits per byte"] = a.bits_per_byte.show(".4f")
        if a.same_answer is not None and a.first_difference is not None:
            lines["same greedy answer"] = a.same_answer.show(".1%")
            lines["tokens before a difference"] = a.first_difference.show(".1f")
        for task, estimate in a.exact_match.items():
            lines[f"exact match, {task}"] = estimate.show(".1%")
        return lines | ({} if self.cost is None else self.cost.facts())

    def __str__(self) -> str:
        return "\n".join([self.name, *(f"  {name}: {value}" for name, value in self.facts().items())])

    __repr__ = __str__

    def __rich__(self) -> RenderableType:
        from rich.table import Table

        from llmlab.graph.reports.render import plain

        table = Table("", "", title=plain(self.name), show_header=False)
        for name, value in self.facts().items():
            table.add_row(plain(name), plain(value))
        return table

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from html import escape

        from llmlab.graph.reports.render import html_table

        rows = [(escape(name), escape(value)) for name, value in self.facts().items()]
        return {"text/plain": str(self), "text/html": html_table((escape(self.name), ""), rows)}


def evaluate(
    engine: Engine | str | Path,
    data: Data | None = None,
    *,
    reference: Engine | Reference | str | Path | None = None,
    samples: int = 64,
    length: int = 256,
    seed: int = 0,
    threads: int | None = None,
    costs: bool = True,
    price_per_hour: float | None = None,
    progress: bool = True,
) -> Evaluation:
    """Run an engine on held-out data and say how good its answers are, and what it costs.

    data: `"tinychat"` (the zoo's held-out chats, the default), a .jsonl or .txt file, or a list of texts, of (prompt, answer)
        pairs, of conversations, of dicts with `text`, `messages`, or `prompt` and `answer`, or of token ids.
    reference: the engine to be held against, as a rule the one in float32; without one there is no KL and no agreement.
    samples, length: sequences, at most, and tokens of each, at most. seed: of the data's choice and of the bootstrap.
    threads: of an onnxruntime engine. costs: also measure size, memory, load time, speed and energy, in a fresh process.
    price_per_hour: of the machine, for what a million generated tokens cost.

    Logits come from the engine as it runs, each token of the data fed in chunks as a prompt is. Intervals are 95 %.
    Raises InputError for data or engines that don't fit, EngineError where the engine fails or its logits are not finite.
    """
    engine = load(engine)
    with ExitStack() as stack:
        if isinstance(reference, Reference):
            if data is not None:
                raise InputError("this reference has its data already: give one of the two")
        elif reference is not None:
            reference = stack.enter_context(
                Reference(
                    reference,
                    "tinychat" if data is None else data,
                    samples=samples,
                    length=length,
                    seed=seed,
                    threads=threads,
                    progress=progress,
                )
            )
        given = reference.samples if reference else read(engine, data or "tinychat", samples, length, seed)
        measured = accuracy(engine, given, reference, seed=seed, threads=threads, progress=progress)
    cost = measure_costs(engine, threads=threads, price_per_hour=price_per_hour) if costs else None
    return Evaluation(engine.path.name, engine.manifest.target, precision(engine), measured, cost)


def precision(engine: Engine) -> str:
    """What the engine was built in, and what it was quantized with."""
    m = engine.manifest
    return f"{m.precision}, {Recipe.parse(m.recipe)}" if m.recipe else m.precision


def accuracy(
    engine: Engine,
    given: Sequence[Sample],
    reference: Reference | None,
    *,
    seed: int = 0,
    threads: int | None = None,
    progress: bool = True,
) -> Accuracy:
    """The engine's accuracy on samples; those of `reference`, where there is one, and greedy answers if it has some."""
    sums = {name: np.zeros(len(given)) for name in ("kl", "same", "bits")}
    with opened(engine, threads) as llm:
        if reference is not None and llm.core.backend.limits.vocab_size != reference.vocab_size:
            raise InputError(
                f"{engine.path} has a vocabulary of {llm.core.backend.limits.vocab_size}, "
                f"the reference one of {reference.vocab_size}: they can't be compared"
            )
        for sample, place, rows in logits(llm, engine, given, progress=progress):
            targets = given[sample].ids[place : place + len(rows)]
            sums["bits"][sample] += surprise(rows, targets).sum()
            if reference is not None:
                wanted = reference.rows(sample, place, len(rows))
                sums["kl"][sample] += divergence(wanted, rows).sum()
                sums["same"][sample] += (wanted.argmax(axis=-1) == rows.argmax(axis=-1)).sum()
        expected = reference.answers if reference is not None else None
        asked = reference is None or expected is not None
        said = greedy(llm, given) if asked and (expected or any(s.answer is not None for s in given)) else None
        right = _right(llm, given, said) if said is not None else {}
    tokens = np.array([s.scored for s in given])
    sizes = [s.bytes or 0 for s in given]
    found = Accuracy(
        len(given),
        int(tokens.sum()),
        kl=ratio(sums["kl"], tokens, seed=seed) if reference else None,
        top1=share(sums["same"], tokens, seed=seed) if reference else None,
        bits_per_byte=ratio(sums["bits"], sizes, seed=seed) if sum(sizes) else None,
        exact_match={task: share(hits, seed=seed) for task, hits in right.items()},
    )
    if said is None or expected is None:
        return found
    places = [first_difference(one, other) for one, other in zip(expected, said, strict=True)]
    until = [len(one) if place is None else place for one, place in zip(expected, places, strict=True)]
    return Accuracy(
        **{
            name: getattr(found, name) for name in ("sequences", "tokens", "kl", "top1", "bits_per_byte", "exact_match")
        },
        same_answer=share([place is None for place in places], seed=seed),
        first_difference=ratio(until, np.ones(len(until)), seed=seed),
    )


def _right(llm: LLM, given: Sequence[Sample], said: Sequence[Sequence[int]]) -> dict[str, list[bool]]:
    """Which answers are right, by task and last of all; only blanks around an answer are forgiven."""
    tasks: dict[str, list[bool]] = {}
    tokenizer = llm.tokenizer
    for sample, tokens in zip(given, said, strict=True):
        if sample.answer is not None and tokenizer is not None:
            hit = tokenizer.decode(tokens).strip() == sample.answer.strip()
            tasks.setdefault(sample.task or "answers", []).append(hit)
    if len(tasks) > 1:
        tasks["all"] = [hit for hits in tasks.values() for hit in hits]
    elif tasks:
        tasks = {"all": next(iter(tasks.values()))}
    return tasks
