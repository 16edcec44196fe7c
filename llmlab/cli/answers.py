"""`llmlab run`: prompts from the command line, answers to the terminal."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from llmlab.errors import InputError

if TYPE_CHECKING:
    from llmlab.runtime.llm import LLM
    from llmlab.runtime.params import SamplingParams
    from llmlab.runtime.session import Prompt

_UNSAFE = {code: "�" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """`text` without control characters: what a model writes must not steer the terminal."""
    return text.translate(_UNSAFE)


def read_prompts(llm: LLM, prompts: Sequence[str], *, chat: bool | None, ids: bool) -> list[Prompt]:
    """Command-line prompts as LLM takes them. chat=None: as messages if the engine has a chat template."""
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    if ids:
        return [_parse_ids(text) for text in texts]
    if chat is None:
        chat = llm.tokenizer is not None and llm.tokenizer.has_chat_template
    return [[{"role": "user", "content": text}] for text in texts] if chat else list(texts)


def answer(llm: LLM, prompts: list[Prompt], params: SamplingParams, *, as_json: bool) -> None:
    """Answer all prompts together; print the answers one after another, each as it comes."""
    if as_json:
        results = llm.generate(prompts, params)
        assert isinstance(results, list)  # as prompts are one
        print(json.dumps([result.to_dict() for result in results], ensure_ascii=False, indent=2))
        return
    out = Console(highlight=False, markup=False, soft_wrap=True)
    notes = Console(highlight=False, markup=False, soft_wrap=True, stderr=True)
    streams = [llm.stream(prompt, params) for prompt in prompts]
    begun = [[*itertools.islice(stream, 1)] for stream in streams]  # all are in flight from here on
    for number, (first, stream) in enumerate(zip(begun, streams, strict=True), start=1):
        if len(streams) > 1:
            out.print(f"[{number}/{len(streams)}] ", style="bold", end="")
        for delta in itertools.chain(first, stream):
            shown = delta.text if llm.tokenizer else " ".join(map(str, [*delta.token_ids, ""]))
            out.print(printable(shown), end="")
            out.file.flush()
        out.print()
        notes.print(f"({stream.result.finish_reason}; {stream.result.metrics})", style="dim")


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise InputError(f"--ids got {text!r}, expected integers such as 1,15,7") from error
