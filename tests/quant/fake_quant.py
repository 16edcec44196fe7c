"""Quantization simulated in torch, beside the graph and in other words than `llmlab.quant` has it: the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from llmlab.quant.scheme import Activations, Weights

_ENDS = {"int8": (-128, 127), "int4": (-8, 7), "int3": (-4, 3)}
Tensor = torch.Tensor


def fake_weight(weight: Tensor, how: Weights) -> Tensor:
    """[N, K], rounded to nearest."""
    rows = weight.reshape(1, -1) if how.per == "tensor" else weight.reshape(-1, how.group or weight.shape[1])
    if how.dtype == "fp8":
        scale = rows.abs().amax(1, keepdim=True) / 448
        return ((rows / scale).to(torch.float8_e4m3fn).float() * scale).reshape(weight.shape)
    low, high = _ENDS[how.dtype]
    if how.symmetric:
        scale = rows.abs().amax(1, keepdim=True) / high
        zero = torch.zeros(1)
    else:
        least, most = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
        scale = (most - least) / (high - low)
        zero = torch.round(low - least / scale).clamp(low, high)
    return ((torch.round(rows / scale) + zero).clamp(low, high).sub(zero) * scale).reshape(weight.shape)


def fake_input(x: Tensor, how: Activations, scale: float | None) -> Tensor:
    largest = 448 if how.dtype == "fp8" else 127
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / largest if how.dynamic else torch.tensor(scale)
    scaled = x / step
    if how.dtype == "fp8":
        return scaled.clamp(-448, 448).to(torch.float8_e4m3fn).float() * step
    return torch.round(scaled).clamp(-128, 127) * step


def fake_quantized(
    model: Any,
    choose: Callable[[str], tuple[Weights | None, Activations | None]],
    scales: Mapping[str, float] | None = None,
) -> Any:
    """A copy of a transformers model whose linear layers compute as `choose(name)` says."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        weights, activations = choose(name)
        if weights is not None:
            module.weight = torch.nn.Parameter(fake_weight(module.weight.detach(), weights))
        if activations is not None:
            scale = None if scales is None else scales[name]

            def before(_: Any, inputs: Any, how: Activations = activations, scale: float | None = scale) -> Any:
                return (fake_input(inputs[0], how, scale), *inputs[1:])

            module.register_forward_pre_hook(before)
    return model
