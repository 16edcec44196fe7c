"""ONNX files as others write them: transformers models through plain `torch.onnx.export`."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any


def write_onnx(
    model: Any,
    path: Path,
    *,
    opset: int = 23,
    optimize: bool = True,
    inputs: tuple[str, ...] = ("input_ids", "position_ids"),
    external: bool = True,
) -> Path:
    """Export a transformers model to `path`, batch and length dynamic under names that are not ours, its config beside it."""
    import torch

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return self.model(**dict(zip(inputs, tensors, strict=True)), use_cache=False).logits

    ids = torch.zeros(2, 7, dtype=torch.long)
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(7).expand(2, 7)}
    rows, columns = torch.export.Dim("rows"), torch.export.Dim("columns")
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            Wrapper().eval(),
            tuple(values[n] for n in inputs),
            dynamic_shapes=(tuple({0: rows, 1: columns} for _ in inputs),),
            strict=False,
        )
        torch.onnx.export(
            program,
            (),
            path,
            opset_version=opset,
            optimize=optimize,
            input_names=list(inputs),
            output_names=["logits"],
            external_data=external,
            verbose=False,
        )
    model.config.to_json_file(path.parent / "config.json")
    return path
