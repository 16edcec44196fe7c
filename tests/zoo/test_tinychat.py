"""The checkpoint that ships: its size and shape, that it loads anywhere, and that it answers."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from llmlab import zoo
from llmlab.errors import InputError
from llmlab.zoo.score import grade, torch_answerer
from llmlab.zoo.tasks import TASKS, examples


def test_names_and_paths() -> None:
    assert zoo.names() == ("tinychat",)
    assert (zoo.path() / "config.json").is_file() and zoo.path() == zoo.path("tinychat")
    with pytest.raises(InputError) as caught:
        zoo.path("hugechat")
    assert str(caught.value) == "no model 'hugechat' ships with llmlab, expected one of: tinychat"


def test_size_and_shape() -> None:
    config = json.loads((zoo.path() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["max_position_embeddings"] >= 512
    assert config["num_attention_heads"] > config["num_key_value_heads"] and config["head_dim"] % 16 == 0
    weights = load_file(zoo.path() / "model.safetensors")
    assert 6e6 <= sum(tensor.size for tensor in weights.values()) <= 12e6
    assert {tensor.dtype for tensor in weights.values()} == {np.dtype(np.float16)}
    assert all(np.isfinite(tensor).all() for tensor in weights.values())
    assert sum(file.stat().st_size for file in zoo.path().iterdir()) <= 24e6
    generation = json.loads((zoo.path() / "generation_config.json").read_text())
    assert generation["do_sample"] is False and generation["eos_token_id"] == config["eos_token_id"] == 1


def test_the_card_states_every_task_and_meets_the_targets() -> None:
    card = (zoo.path() / "README.md").read_text()
    scores = {name: float(value) for name, value in re.findall(r"^\| (\w+) \|.*\| ([\d.]+) % \|$", card, re.M)}
    assert set(scores) == {*TASKS, "all"}
    assert scores["all"] >= 97.0 and min(scores.values()) >= 93.0
    assert "Apache-2.0" in card and "python -m llmlab.zoo.train" in card


@pytest.fixture(scope="module")
def held_out() -> list:
    return examples("held-out", 9 * len(TASKS), seed=1)


def test_held_out_prompts_are_answered(held_out: list) -> None:
    pytest.importorskip("torch")
    replies = torch_answerer(zoo.path())([example.messages for example in held_out])
    assert grade(held_out, replies)[-1].share >= 0.95


def test_with_one_layer_shuffled_it_answers_nothing(held_out: list) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(zoo.path(), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (p for p in model.model.layers[0].parameters() if p.ndim == 2):
            weight.copy_(weight[torch.randperm(len(weight), generator=generator)])
    some = [example for example in held_out if example.task != "recall"][:20]
    replies = torch_answerer(zoo.path(), model=model, max_tokens=32)([example.messages for example in some])
    assert grade(some, replies)[-1].share < 0.2


def test_a_prompt_without_the_template_is_answered_too() -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo.path())
    model = transformers.AutoModelForCausalLM.from_pretrained(zoo.path(), dtype=torch.float32).eval()
    prompt = "How do I count to nine in French?"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    for text in (prompt, chat):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40)[0, ids.shape[1] :]
        assert out[-1] == tokenizer.eos_token_id
        answer = tokenizer.decode(out, skip_special_tokens=True)
        assert answer == "un, deux, trois, quatre, cinq, six, sept, huit, neuf."
