"""Exporting torch modules: the config and the tokenizer that they don't bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llmlab as ll
from llmlab.checkpoint import resolve
from llmlab.errors import InputError

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

    class Toy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(16, 4)

        def forward(self, input_ids: Any, position_ids: Any) -> Any:
            return (self.embed(input_ids) + position_ids[..., None]) @ self.embed.weight.T

    return Toy()


def test_a_module_gets_the_tokenizer_it_is_given(tmp_path: Path) -> None:
    graph = ll.export(toy(), config=CONFIG, tokenizer="tinychat")
    there = resolve("tinychat")
    assert graph.assets["tokenizer.json"] == (there / "tokenizer.json").read_bytes()
    assert {"chat_template.jinja", "generation_config.json"} < set(graph.assets)
    assert graph.config.model_type == "toy"


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
