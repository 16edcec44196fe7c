"""Exact match on held-out prompts: `python -m llmlab.zoo.score [--count 2000] [--engine torch|PATH]`.

Every way of running the model is an `Answerer`, a function from chats to texts; grading is the same for all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from llmlab import zoo
from llmlab.errors import InputError, LlmlabError, require
from llmlab.zoo.tasks import SPLITS, TASKS, Example, Message, examples

MAX_TOKENS = 192
"""Longer than any answer."""

Answerer: TypeAlias = Callable[[list[list[Message]]], list[str]]
"""Chats, each ending with a user turn, to the reply to each."""


@dataclass(frozen=True)
class Score:
    """How many replies of one task were exactly right."""

    task: str
    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / self.total if self.total else 0.0


def is_right(example: Example, reply: str) -> bool:
    """Exact match; only blanks around the reply are forgiven."""
    return reply.strip() == example.answer


def grade(chats: Sequence[Example], replies: Sequence[str]) -> list[Score]:
    """One Score a task, in the order of TASKS, and last one for all tasks together.

    Raises:
        InputError: not as many replies as examples.
    """
    if len(chats) != len(replies):
        raise InputError(f"{len(replies)} replies for {len(chats)} examples: give one each, in the same order")
    right, total = dict.fromkeys(TASKS, 0), dict.fromkeys(TASKS, 0)
    for example, reply in zip(chats, replies, strict=True):
        total[example.task] += 1
        right[example.task] += is_right(example, reply)
    scores = [Score(task, right[task], total[task]) for task in TASKS if total[task]]
    return [*scores, Score("all", sum(right.values()), len(chats))]


def table(scores: Sequence[Score], title: str) -> Table:
    """The scores as a rich table."""
    drawn = Table(title=title)
    drawn.add_column("task")
    for column in ("right", "of", "exact match"):
        drawn.add_column(column, justify="right")
    for score in scores:
        if score.task == "all":
            drawn.add_section()
        drawn.add_row(score.task, str(score.right), str(score.total), f"{score.share:.1%}")
    return drawn


def torch_answerer(
    checkpoint: Path, device: str = "cpu", batch: int = 16, model: Any = None, max_tokens: int = MAX_TOKENS
) -> Answerer:
    """Greedy replies of a checkpoint run by transformers in fp32; `model` stands in for the checkpoint's own."""
    torch, transformers = require("torch", "export"), require("transformers", "export")
    if model is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = model.to(device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, padding_side="left")

    def answer(chats: list[list[Message]]) -> list[str]:
        prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        replies = [""] * len(prompts)
        for start in tqdm(range(0, len(order), batch), desc="answering", leave=False):
            rows = order[start : start + batch]
            inputs = tokenizer([prompts[row] for row in rows], return_tensors="pt", padding=True).to(device)
            inputs.pop("token_type_ids", None)
            with torch.inference_mode():
                ids = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
            texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                replies[row] = text
        return replies

    return answer


def engine_answerer(engine: Path) -> Answerer:
    """Greedy replies of an engine folder run by llmlab's own runtime."""
    import llmlab as ll

    def answer(chats: list[list[Message]]) -> list[str]:
        with ll.LLM(engine) as llm:
            results = llm.chat(chats, ll.SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS))
        return [result.text for result in (results if isinstance(results, list) else [results])]

    return answer


def _answerer(engine: str | None, checkpoint: Path, device: str, work: Path) -> tuple[Answerer, str]:
    if engine == "torch":
        return torch_answerer(
            checkpoint, device, batch=16 if device == "cpu" else 256
        ), f"{checkpoint.name}, transformers, fp32"
    if engine is not None:
        return engine_answerer(Path(engine)), f"{engine}, llmlab"
    import llmlab as ll

    ll.build(ll.optimize(ll.export(str(checkpoint))), work / "engine")
    return engine_answerer(work / "engine"), f"{checkpoint.name}, llmlab"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m llmlab.zoo.score", description="Exact match on held-out prompts")
    parser.add_argument("--count", type=int, default=2000, help="prompts over all tasks")
    parser.add_argument("--engine", help="'torch', or an engine folder; default: build one from the checkpoint")
    parser.add_argument("--checkpoint", type=Path, help="default: the tinychat that ships")
    parser.add_argument("--split", choices=SPLITS, default="held-out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--task", choices=tuple(TASKS))
    parser.add_argument("--device", default="cpu", help="torch device for --engine torch")
    parser.add_argument("--wrong", type=int, default=0, metavar="N", help="also show N wrong replies a task")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    given = parser.parse_args(arguments)
    try:
        chats = examples(given.split, given.count, seed=given.seed, task=given.task)
        with tempfile.TemporaryDirectory() as work:
            checkpoint = given.checkpoint or zoo.path()
            answer, title = _answerer(given.engine, checkpoint, given.device, Path(work))
            replies = answer([example.messages for example in chats])
        scores = grade(chats, replies)
    except LlmlabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps({score.task: {"right": score.right, "total": score.total} for score in scores}))
    else:
        Console().print(table(scores, f"{len(chats):,} {given.split} prompts, {title}"))
    shown = dict.fromkeys(TASKS, given.wrong)
    for example, reply in zip(chats, replies, strict=True):
        if not is_right(example, reply) and shown[example.task] > 0:
            shown[example.task] -= 1
            print(f"{example.task}: {example.prompt[-200:]!r}\n  expected {example.answer!r}\n  got      {reply!r}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
