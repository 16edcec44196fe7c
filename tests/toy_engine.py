"""A stand-in for Engine over the toy backend, with a real tokenizer: the front-end without a model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from toy import ToyBackend, true_logits

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ suffix }}"
)


@cache
def tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and that was that", "count to nine"] * 3, trainer)
    return tokenizer.to_str()


def vocab_size() -> int:
    return Tokenizer.from_str(tokenizer_json()).get_vocab_size()


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


@dataclass
class ToyLimits:
    max_tokens_per_step: int = 64


@dataclass
class ToyManifest:
    eos_token_ids: tuple[int, ...] = (0,)
    generation: dict[str, Any] = field(default_factory=dict)
    max_seq_len: int = 96
    limits: ToyLimits = field(default_factory=ToyLimits)

    @property
    def max_num_seqs(self) -> int:
        return self.limits.max_tokens_per_step


@dataclass
class ToyEngine:
    path: Path
    manifest: ToyManifest = field(default_factory=ToyManifest)
    options: dict[str, Any] = field(default_factory=dict)
    kind: type[ToyBackend] = ToyBackend
    made: ToyBackend | None = None
    """The backend handed out last."""
    threads: int | None = None

    def backend(self, *, max_num_seqs: int, threads: int | None = None, **pool: float | None) -> ToyBackend:
        self.threads = threads
        sizes = {"vocab_size": vocab_size(), "max_seq_len": self.manifest.max_seq_len, "num_blocks": 256}
        sizes["max_tokens_per_step"] = self.manifest.limits.max_tokens_per_step
        self.made = self.kind(**{**sizes, **self.options})
        return self.made


def greedy(prompt: list[int], count: int, eos: int | None = 0) -> list[int]:
    """What an undisturbed request has to give: the oracle."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(int(np.argmax(true_logits(tokens, vocab_size()))))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]
