"""Exporting torch modules: the config and the tokenizer that they don't bring."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

import llmlab as ll
from llmlab.checkpoint import resolve
from llmlab.errors import InputError
from llmlab.graph.sources.trace import STAGES

CONFIG = {
    "model_type": "toy",
    "vocab_size": 16,
    "hidden_size": 4,
    "num_layers": 1,
    "num_heads": 1,
    "max_position_embeddings": 32,
}


def toy() -> Any:
    import torch

    tiny.parse_operators_once()

    class Toy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(16, 4)
            self.positions = torch.nn.Embedding(32, 4)

        def forward(self, input_ids: Any, position_ids: Any) -> Any:
            return (self.embed(input_ids) + self.positions(position_ids)) @ self.embed.weight.T

    return Toy()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_module_gets_the_tokenizer_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    graph = ll.export(toy(), config=CONFIG, tokenizer="tinychat")
    at = [screen.getvalue().index(f"exporting Toy: {stage}") for stage in STAGES]
    assert at == sorted(at), "a terminal is told what takes so long"
    there = resolve("tinychat")
    assert graph.assets["tokenizer.json"] == (there / "tokenizer.json").read_bytes()
    assert {"chat_template.jinja", "generation_config.json"} < set(graph.assets)
    assert graph.config.model_type == "toy"


def test_a_config_that_promises_longer_sequences_than_the_module_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same module as above, which has 32 positions; and nobody is told anything, as asked."""
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with pytest.raises(InputError) as caught:
        ll.export(toy(), config=CONFIG | {"max_position_embeddings": 64}, progress=False)
    message = str(caught.value)
    assert "positions/Gather looks positions up in a table of 32 rows" in message and "max_seq_len=32" in message
    assert "\n" not in message and screen.getvalue() == ""


@pytest.mark.parametrize("where", ["missing", "empty"])
def test_a_tokenizer_that_is_not_there(tmp_path: Path, where: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as caught:
        ll.export(toy(), config=CONFIG, tokenizer=tmp_path / where)
    reason = {"missing": "is no folder; expected a checkpoint folder", "empty": "no tokenizer.json there"}[where]
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_checkpoint_brings_is_not_given() -> None:
    with pytest.raises(InputError, match="tokenizer goes with a torch module"):
        ll.export("tinychat", tokenizer="tinychat")
    with pytest.raises(InputError, match="config goes with a torch module"):
        ll.export("tinychat", config=CONFIG)
    with pytest.raises(InputError, match=r"Toy has no \.config; pass config="):
        ll.export(toy())
