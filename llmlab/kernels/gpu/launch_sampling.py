"""The sampling kernels started by Triton's own launcher on torch tensors: for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from llmlab.errors import require
from llmlab.kernels.gpu.geometry import SamplingGrid
from llmlab.kernels.gpu.sampling import sample_choose, sample_narrow, sample_peaks, sample_weigh


def scratch(grid: SamplingGrid, device: Any) -> dict[str, Any]:
    """What the kernels leave for each other, poisoned."""
    torch = require("torch", "export")
    shapes = grid.scratch_shapes.items()
    return {name: torch.full(shape, -7, dtype=getattr(torch, dtype), device=device) for name, (dtype, shape) in shapes}


def sample(
    grid: SamplingGrid,
    tokens: Any,
    logits: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    uniform: Any,
    scratch: dict[str, Any],
    *,
    drawn: bool = True,
) -> None:
    """Fill `tokens` i32 [N]. `logits` f32 or f16 [N, vocab]; top_k i32 [N], temperature, top_p, min_p, uniform f32 [N].

    `drawn=False` where all rows are greedy: two launches instead of nine.
    """
    hist, state, mass, parts, first = (scratch[name] for name in ("hist", "state", "mass", "parts", "first"))
    launches = grid.launches()

    def start(kernel: Any, *arguments: Any) -> None:
        launch = launches[kernel.__name__]
        kernel[launch.grid](*arguments, **launch.constants, **launch.options)

    start(sample_peaks, parts, first, hist, logits, temperature)
    if drawn:
        for step in range(6):
            start(sample_narrow, hist, state, logits, parts, temperature, top_k, top_p, step)
        start(sample_weigh, mass, state, logits, parts, hist, temperature, top_k, top_p, min_p)
    start(sample_choose, tokens, logits, parts, first, mass, state, temperature, uniform, grid.splits)
