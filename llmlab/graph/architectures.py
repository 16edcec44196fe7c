"""What was measured of each model family against transformers: the table in the README and of `llmlab inspect --architectures`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmlab.errors import GraphError
from llmlab.files import read_json

RESULTS = Path(__file__).with_name("architectures.json")
"""Written by `make architectures`, never by hand."""


def measured() -> dict[str, Any]:
    """The results that this version ships: `date`, `versions`, `families`, `others`.

    A family has its name, `features`, `error` (worst relative error of the logits over all steps), `control` (the smallest error
    that a deliberate mistake made), `decode_steps`. Others are architectures that nobody named, swept over: each with its
    `model_type` and either its `error` or the reason why it is `refused`.
    """
    found: dict[str, Any] = read_json(RESULTS, GraphError)
    return found


def markdown() -> str:
    """The README's section: families in a table, the others in two sentences."""
    found = measured()
    right = sorted(o["model_type"] for o in found["others"] if "error" in o)
    refused = sorted(o["model_type"] for o in found["others"] if "refused" in o)
    lines = [
        "| family | what there is to get right | error | a mistake makes |",
        "|---|---|---|---|",
        *(f"| {f['family']} | {f['features']} | {f['error']:.0e} | {f['control']:.2f} |" for f in found["families"]),
        "",
        f"Random weights, ragged and chunked batches, {min((f['decode_steps'] for f in found['families']), default=0)} decode steps and "
        "a preemption, on ONNX Runtime. *Error*: the logits' largest difference from transformers' cached generation, of the largest logit. "
        "*A mistake makes*: the smallest error after a deliberate one (a wrong slot, length or position), which shows that the test "
        f"would see it. {_versions(found)}",
    ]
    if right or refused:
        lines += [
            "",
            f"All other architectures that transformers has for causal language models were swept over, {len(right) + len(refused)} that can be made small: "
            f"{len(right)} came out right ({', '.join(right)}), {len(refused)} were refused in one line ({', '.join(refused)}), none was wrong.",
        ]
    return "\n".join(lines) + "\n"


def _versions(found: dict[str, Any]) -> str:
    return f"Measured {found['date']} with {', '.join(f'{name} {version}' for name, version in found['versions'].items())}."
