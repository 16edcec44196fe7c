"""What can't be served right is refused, in one line that names what didn't match."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import steps
import tiny
from steps import worst_error

from llmlab.build import build
from llmlab.errors import LlmlabError, UnsupportedModelError
from llmlab.graph.export import export
from llmlab.graph.interpret import Interpreter
from llmlab.graph.optimize import optimize

TOLERANCE = 1e-4
NOT_TRACED = "torch can't export it"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({"model_type": "mamba"}, NOT_TRACED),
}
REFUSED_SLOW: dict[str, tuple[dict[str, Any], str]] = {
    "bert": ({"model_type": "bert"}, "attention is bidirectional; only causal self-attention can be paged"),
    # As falcon-rw-1b has it: ALiBi computed in bfloat16, in which positions beyond 256 are rounded.
    "falcon-rw": (
        {
            "model_type": "falcon",
            "alibi": True,
            "bias": True,
            "multi_query": False,
            "parallel_attn": False,
            "max_position_embeddings": 2048,
        },
        "not ALiBi (at 1024 tokens it is not linear in the key's position))",
    ),
    "dynamic rope": (
        {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
        "torch can't export it: Could not guard on data-dependent expression",
    ),
}


def refusal(folder: Path, config: dict[str, Any]) -> str:
    tiny.write_checkpoint(folder, config)
    with pytest.raises(LlmlabError) as caught:
        optimize(export(folder))
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message
    return message


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_are_refused(tmp_path: Path, name: str) -> None:
    config, reason = REFUSED[name]
    message = refusal(tmp_path / "c", config)
    assert reason in message and config["model_type"] in message.lower()


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED_SLOW)
def test_more_architectures_that_are_refused(tmp_path: Path, name: str) -> None:
    config, reason = REFUSED_SLOW[name]
    assert reason in refusal(tmp_path / "c", config)


TOY = {
    "model_type": "toy",
    "vocab_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def toy(mask: str, mixer: str = "none") -> Any:
    """A torch module of one attention layer over two heads of 8, with the mask that `mask` names."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attend

    tiny.parse_operators_once()

    class Toy(torch.nn.Module):
        config = TOY

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = torch.nn.Embedding(12, 16)
            self.q, self.k, self.v, self.o = (torch.nn.Linear(16, 16, bias=False) for _ in range(4))
            self.head = torch.nn.Linear(16, 12, bias=False)

        def forward(self, input_ids: Any, position_ids: Any) -> Any:
            x = self.embed(input_ids)
            batch, length, _ = x.shape
            q, k, v = (f(x).reshape(batch, length, 2, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
            at = torch.arange(length)
            causal = at[:, None] >= at[None]
            match mask:
                case "causal":
                    y = attend(q, k, v, is_causal=True)
                case "none":
                    y = attend(q, k, v)
                case "padding":
                    y = attend(q, k, v, attn_mask=causal & (input_ids != 0)[:, None, None])
                case "bias":
                    y = attend(
                        q, k, v, attn_mask=torch.where(causal, -((at[:, None] - at[None]) ** 2) * 0.1, float("-inf"))
                    )
            y = self.o(y.transpose(1, 2).reshape(batch, length, 16))
            match mixer:
                case "cumsum":
                    y = y.cumsum(1)
                case "mean":
                    y = y - y.mean(1, keepdim=True)
                case "softmax":
                    y = y.softmax(1)
            return self.head(x + y)

    return Toy()


@pytest.mark.parametrize(
    ("mask", "mixer", "reason"),
    [
        ("none", "none", "it is not causal: every token sees every other"),
        ("padding", "none", "the mask depends on the tokens themselves"),
        ("bias", "none", "the mask adds numbers to the scores that are not ALiBi"),
        ("causal", "cumsum", "it works along the token axis"),
        ("causal", "mean", "may mix tokens of different sequences"),
        ("causal", "softmax", "it works along the token axis"),
    ],
)
def test_torch_modules_that_are_refused(mask: str, mixer: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        optimize(export(toy(mask, mixer)))
    message = str(caught.value)
    assert message.startswith("toy: ") and reason in message and "\n" not in message
    assert "drop_batch_axis" not in message, "what follows from the reason is none"


def test_a_torch_module_that_passes_is_right(tmp_path: Path) -> None:
    import torch

    module = toy("causal")
    plan = steps.Plan(((5, 1, 1), (1, 3, 1)))
    with torch.no_grad():
        expected = [module(torch.tensor(t[None]), None)[0].numpy() for t in plan.tokens(12)]
    serving = optimize(export(module))
    interpreter = Interpreter(serving, num_blocks=8, block_size=4)
    backend = build(serving, tmp_path / "e").backend(threads=1, max_num_seqs=2)
    paged = steps.batches(plan, 12, steps.paged_tables(plan, 4, 8), steps.all_rows)
    slots = steps.batches(plan, 12, steps.slot_tables(plan, [1, 0]), steps.all_rows)
    for (batch, rows), (slotted, _) in zip(paged, slots, strict=True):
        truth = np.array([expected[b][i] for b, i in rows])
        assert worst_error(interpreter.step(steps.feeds(batch)), truth) < TOLERANCE
        assert worst_error(backend.execute(slotted), truth) < TOLERANCE
