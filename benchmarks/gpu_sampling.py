"""Choosing tokens on an NVIDIA GPU: time and bandwidth of the sampling kernels beside torch.

    python benchmarks/gpu_sampling.py [--json FILE]

Greedy reads every logit once, so what it achieves is bytes of logits over time, beside a device-to-device copy in the same
run. torch: argmax; for top-p what is usually written with it: sort, softmax, cumulative sum, mask, multinomial. Two kinds of
logits: `peaked` have a few likely tokens, as language models' do; `flat` are normal with a deviation of 2, so that tens of
thousands of tokens are likely, the worst case for top-p. Times are medians of CUDA-graph replays with the L2 cache cleared.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from gpu_attention import copy_bandwidth, replay_ms, write
from tables import show

from llmlab.kernels.gpu import launch_sampling
from llmlab.kernels.gpu.geometry import SamplingGrid

ROWS, VOCABS = (1, 8, 64), (32000, 128256)
KINDS = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50": {"top_k": 50},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
}


def make_logits(shape: str, rows: int, vocab: int) -> torch.Tensor:
    logits = torch.randn(rows, vocab, device="cuda") * 2
    if shape == "peaked":
        likely = torch.randint(0, vocab, (rows, 40), device="cuda")
        logits.scatter_add_(1, likely, 16 - 2 * torch.randn(rows, 40, device="cuda").abs())
    return logits


def drawn(probabilities: torch.Tensor) -> torch.Tensor:
    """What torch.multinomial does for one number a row, without its checks, which wait for the GPU."""
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


def torch_filtered(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    if top_k:
        values, ids = logits.topk(top_k, dim=-1)
    else:
        values, ids = logits.sort(dim=-1, descending=True)
    probabilities = values.softmax(-1)
    if top_p < 1:
        probabilities = torch.where(probabilities.cumsum(-1) - probabilities < top_p, probabilities, 0)
    return ids.gather(1, drawn(probabilities)[:, None])[:, 0]


def row_of(name: str, shape: str, rows: int, vocab: int, copy: float, processors: int) -> dict[str, Any]:
    kind = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | KINDS[name]
    logits = make_logits(shape, rows, vocab)
    grid = SamplingGrid.fill(rows, vocab, processors)
    columns = [
        torch.full((rows,), value, dtype=torch.int32 if key == "top_k" else torch.float32, device="cuda")
        for key, value in kind.items()
    ]
    uniform = torch.rand(rows, device="cuda")
    tokens = torch.full((rows,), -99, dtype=torch.int32, device="cuda")
    scratch, greedy = launch_sampling.scratch(grid, "cuda"), kind["temperature"] == 0

    def ours() -> None:
        launch_sampling.sample(grid, tokens, logits, *columns, uniform, scratch, drawn=not greedy)

    def theirs() -> torch.Tensor:
        if greedy:
            return logits.argmax(-1)
        if name == "temperature":
            return drawn(logits.softmax(-1))
        return torch_filtered(logits, int(kind["top_k"]), kind["top_p"])

    ms, torch_ms = replay_ms(ours), replay_ms(theirs)
    if greedy:
        assert torch.equal(tokens.long(), theirs())
    assert int(tokens.min()) >= 0
    rate = logits.nbytes / ms / 1e9
    return {
        "kind": name,
        "logits": shape,
        "rows": rows,
        "vocab": vocab,
        "splits": grid.splits,
        "us": round(1000 * ms, 1),
        "tb_per_s": round(rate, 3),
        "of_copy": round(rate / copy, 3),
        "torch_us": round(1000 * torch_ms, 1),
        "against_torch": round(torch_ms / ms, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    given = parser.parse_args()
    torch.manual_seed(0)
    card = torch.cuda.get_device_properties(0)
    copy = copy_bandwidth()
    print(f"{card.name}, {card.multi_processor_count} multiprocessors; copy {copy:.2f} TB/s; float32 logits")
    rows = [
        row_of(name, shape, count, vocab, copy, card.multi_processor_count)
        for name in KINDS
        for shape in (("peaked",) if name == "greedy" else ("peaked", "flat"))
        for vocab in VOCABS
        for count in ROWS
    ]
    show("one token a row", rows)
    if given.json is not None:
        write(given.json, "python benchmarks/gpu_sampling.py", copy, rows=rows)


if __name__ == "__main__":
    main()
