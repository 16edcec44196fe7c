"""`llmlab bench`: what it is asked, and how its numbers look."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from llmlab.errors import InputError
from llmlab.speed import BenchRow


def batch_sizes(text: str) -> list[int]:
    """`"1,8"` as numbers. Raises InputError."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise InputError(f"--batch is {text!r}, expected positive integers such as 1,8")
    return sizes


def show(rows: Sequence[BenchRow], what: str, *, as_json: bool) -> None:
    """what: the engine's path, or the shape and target that were measured."""
    if as_json:
        print(json.dumps({"engine": what, "rows": [asdict(row) for row in rows]}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{what}: {rows[0].prompt_len} tokens in, {rows[0].output_len} out")
    for name in ("batch", "prefill tokens/s", "first token", "decode tokens/s", "decode step", "tokens/s", "outside"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.batch),
            f"{row.prefill_tokens_per_s:,.0f}",
            f"{row.first_token_ms:,.1f} ms",
            f"{row.decode_tokens_per_s:,.1f}",
            f"{row.decode_step_ms:.2f} ms",
            f"{row.tokens_per_s:,.1f}",
            f"{row.outside_backend_share:.1%}",
        )
    Console().print(table)
