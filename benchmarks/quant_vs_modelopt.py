"""What quantization costs tinychat, by llmlab and by nvidia-modelopt: the same settings, calibration and held-out tokens.

    python -m venv modelopt && modelopt/bin/pip install nvidia-modelopt torch transformers requests
    python benchmarks/quant_vs_modelopt.py --modelopt modelopt/bin/python --json benchmarks/results/quant_vs_modelopt.json

Both start from the same float16 checkpoint in float32 and leave embedding and head wide. modelopt simulates quantization in torch; llmlab's
graph runs on ONNX Runtime. KL to the float32 model and how often the likeliest token is the same, over all tokens of
held-out chats, with 95 % intervals over chats. modelopt's own strength of SmoothQuant is 1. Its
AWQ with clipping is slow on a CPU: it had not ended after 25 minutes on two busy cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np
from rich.console import Console
from rich.table import Table

import llmlab as ll
from llmlab import zoo
from llmlab.evaluate.metrics import divergence, ratio
from llmlab.quant.calibrate import logits
from llmlab.quant.data import calibration_data, tokenizer_of
from llmlab.zoo.tasks import examples

FP8 = {"weights": {"dtype": "fp8", "per": "tensor"}, "activations": {"dtype": "fp8"}}
SETTINGS: dict[str, tuple[Any, dict[str, Any] | None]] = {
    "int8, a scale a row": ("int8", {"config": "INT8_WEIGHT_ONLY_CFG"}),
    "int4 g128, to nearest": ("int4_rtn_g128", {"config": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "group": 128}),
    "int4 g128, AWQ": ("int4_awq_g128", {"config": "INT4_AWQ_CFG", "group": 128, "algorithm": {"method": "awq_full"}}),
    "int4 g128, AWQ without clipping": (
        {"weights": {"dtype": "int4", "group": 128, "method": "awq", "clip": False}},
        {"config": "INT4_AWQ_CFG", "group": 128},
    ),
    "int4 g128, GPTQ": ("int4_gptq_g128", None),
    "int4 g64, to nearest": ("int4_rtn_g64", {"config": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "group": 64}),
    "int4 g64, AWQ": ("int4_awq_g64", {"config": "INT4_AWQ_CFG", "group": 64, "algorithm": {"method": "awq_full"}}),
    "int4 g64, GPTQ": ("int4_gptq_g64", None),
    "int8 W8A8, largest value": (
        {"weights": {"dtype": "int8"}, "activations": {"dtype": "int8", "scale": "absmax"}},
        {"config": "INT8_DEFAULT_CFG"},
    ),
    "int8 W8A8": ("int8_w8a8", {"config": "INT8_DEFAULT_CFG"}),
    "int8 SmoothQuant": ("int8_smoothquant", {"config": "INT8_SMOOTHQUANT_CFG"}),
    **{
        f"int8 SmoothQuant, strength {alpha:g}": (
            {"base": "int8_smoothquant", "activations": {"dtype": "int8", "smooth": alpha, "scale": "absmax"}},
            {"config": "INT8_SMOOTHQUANT_CFG", "algorithm": {"method": "smoothquant", "alpha": alpha}},
        )
        for alpha in (0.5, 0.9, 1.0)
    },
    "fp8, per tensor": (FP8, {"config": "FP8_DEFAULT_CFG"}),
}
"""By setting: llmlab's recipe, and modelopt's configuration (None: it has none)."""


def chats(split: str, count: int, seed: int) -> list[Any]:
    return [[*e.messages, {"role": "assistant", "content": e.answer}] for e in examples(split, count, seed=seed)]


def by_modelopt(python: Path, data: dict[str, list[np.ndarray]], names: list[str], work: Path) -> tuple[Any, Any]:
    """Its logits by setting, and what it printed."""
    configs = {name: peer for name in names if (peer := SETTINGS[name][1]) is not None}
    (work / "configs.json").write_text(json.dumps(configs))
    arrays = {f"{what}.{i:05}": ids for what, samples in data.items() for i, ids in enumerate(samples)}
    np.savez(work / "ids.npz", **arrays)
    peer = Path(__file__).with_name("modelopt_peer.py")
    files = [work / "ids.npz", work / "logits.npz", work / "configs.json"]
    command = [str(part) for part in (python, peer, zoo.path(), *files)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    with np.load(work / "logits.npz") as found:
        return {name: found[name] for name in found.files}, json.loads(done.stdout.strip().splitlines()[-1])


def scores(reference: np.ndarray, found: np.ndarray, ends: np.ndarray) -> dict[str, Any]:
    """KL and top-1 agreement of [tokens, vocab], with intervals over samples that end at `ends`."""
    lost, same = divergence(reference, found), reference.argmax(-1) == found.argmax(-1)
    sizes = np.diff(ends, prepend=0)
    parts = [np.array([part.sum() for part in np.split(v, ends[:-1])]) for v in (lost, same.astype(np.float64))]
    return {"kl": ratio(parts[0], sizes).to_dict(), "top1": ratio(parts[1], sizes).to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--modelopt", type=Path, required=True, help="the Python of an environment with nvidia-modelopt"
    )
    parser.add_argument("--samples", type=int, default=128, help="calibration chats")
    parser.add_argument("--held-out", type=int, default=200, help="chats that are scored")
    parser.add_argument("--only", action="append", choices=list(SETTINGS), help="settings (default: all)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    graph = ll.optimize(ll.export("tinychat"))
    tokenizer = tokenizer_of(graph)
    seen = calibration_data("tinychat", tokenizer, samples=args.samples)
    held_out = calibration_data(chats("held-out", args.held_out, 11), tokenizer, samples=args.held_out)
    ends = np.cumsum([len(ids) for ids in held_out])
    names = args.only or list(SETTINGS)
    with tempfile.TemporaryDirectory() as work:
        theirs, said = by_modelopt(args.modelopt, {"calibration": seen, "held_out": held_out}, names, Path(work))
    reference = np.concatenate(list(logits(graph, held_out)))
    gap = float(np.abs(reference - theirs["fp32"]).max() / np.abs(reference).max())
    rows: dict[str, Any] = {}
    for name in names:
        began = time.perf_counter()
        quantized = ll.quantize(graph, SETTINGS[name][0], seen)
        seconds = round(time.perf_counter() - began, 1)
        rows[name] = {
            "llmlab": scores(reference, np.concatenate(list(logits(quantized, held_out))), ends) | {"seconds": seconds}
        }
        if name in theirs:
            rows[name]["modelopt"] = scores(theirs["fp32"], theirs[name], ends) | {"seconds": said["seconds"][name]}
        print(f"{name}: done", file=sys.stderr)
    table = Table(
        title=f"tinychat, {len(held_out)} held-out chats ({ends[-1]:,} tokens), {len(seen)} calibration chats"
    )
    for column in ("setting", "KL llmlab", "KL modelopt", "top-1 llmlab", "top-1 modelopt"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for name, row in rows.items():
        cells = []
        for what in ("kl", "top1"):
            for side in ("llmlab", "modelopt"):
                number = row[side][what]["value"] if side in row else None
                cells.append("–" if number is None else f"{number:.5f}" if what == "kl" else f"{number:.2%}")
        table.add_row(name, *cells)
    described = machine.describe({"modelopt's " + name: number for name, number in said["packages"].items()})
    console = Console(width=120)
    console.print(table)
    console.print(f"float32 by both differs by {gap:.1e} of the largest logit")
    console.print(machine.summary(described))
    if args.json:
        result = {
            "machine": described,
            "float32_gap": gap,
            "tokens": int(ends[-1]),
            "calibration": len(seen),
            "settings": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
