"""Train tinychat: `python -m llmlab.zoo.train --out runs/tinychat` (minutes on a data-center GPU; runs on a CPU too).

The text comes from llmlab.zoo.tasks, made while training by worker processes. Only answers are learned. The result is
a folder that AutoModelForCausalLM and AutoTokenizer load, in half precision, written whole or not at all. Ctrl-C
stops early and keeps what was learned.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from llmlab.errors import InputError, LlmlabError, require
from llmlab.zoo.batches import IGNORE, ChatArray, training_batch
from llmlab.zoo.tasks import examples
from llmlab.zoo.tokenizer import END, PAD, SPECIAL, VOCAB_SIZE, save_tokenizer, train_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run gives."""

    steps: int = 6_000
    batch: int = 640
    """Chats a step."""
    learning_rate: float = 2e-3
    """At its peak; falls to zero on a cosine."""
    warmup: float = 0.04
    """Part of the run in which the learning rate rises."""
    weight_decay: float = 0.05
    seed: int = 0
    tokenizer_chats: int = 30_000
    """Training chats that the tokenizer is made from."""
    hidden_size: int = 384
    intermediate_size: int = 768
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    max_length: int = 1024


def make_tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer of a run, made from its training chats alone."""
    chats = examples("train", recipe.tokenizer_chats, seed=recipe.seed)
    return train_tokenizer(text for chat in chats for text in (*(m["content"] for m in chat.messages), chat.answer))


def make_model(recipe: Recipe) -> Any:
    """A fresh LlamaForCausalLM of the recipe's shape in fp32."""
    torch, transformers = require("torch", "export"), require("transformers", "export")
    torch.manual_seed(recipe.seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.max_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL.index(END),
        pad_token_id=SPECIAL.index(PAD),
    )
    return transformers.LlamaForCausalLM(config)


class _Steps:
    """The training batches as a dataset: item i is step i."""

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe) -> None:
        self.text, self.recipe = tokenizer.to_str(), recipe
        self.tokenizer: Tokenizer | None = None

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> list[ChatArray]:
        if self.tokenizer is None:  # once a worker process
            self.tokenizer = Tokenizer.from_str(self.text)
        return training_batch(self.tokenizer, step, self.recipe.batch, self.recipe.max_length, self.recipe.seed)


def _batches(tokenizer: Tokenizer, recipe: Recipe, workers: int) -> Iterator[list[ChatArray]]:
    loader = require("torch.utils.data", "export").DataLoader
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the worker processes are the parallelism
    more = {"prefetch_factor": 8} if workers else {}
    return iter(loader(_Steps(tokenizer, recipe), batch_size=None, num_workers=workers, collate_fn=_unchanged, **more))


def _unchanged(batch: list[ChatArray]) -> list[ChatArray]:
    return batch


def learning_rate(done: float, recipe: Recipe) -> float:
    """Linear warmup, then a cosine down to zero; `done` is the part of the run that lies behind, 0 to 1."""
    if done < recipe.warmup:
        return recipe.learning_rate * done / recipe.warmup
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (done - recipe.warmup) / (1 - recipe.warmup)))


class _Step:
    """One optimizer step. On a GPU the whole of it is recorded once as a CUDA graph and then replayed: thousands of
    small kernels would otherwise wait for Python."""

    def __init__(self, model: Any, recipe: Recipe, first: list[ChatArray], device: str, graphed: bool) -> None:
        self.torch = torch = require("torch", "export")
        self.model, self.device, self.graph = model, device, None
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        self.rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=self.rate,
            betas=(0.9, 0.98),
            capturable=device != "cpu",
        )
        self.inputs = [[torch.zeros(a.shape, dtype=torch.long, device=device) for a in self._parts(c)] for c in first]
        if graphed:
            self._fill(first)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # warms up libraries and optimizer state; at rate 0 it changes no weight
                for _ in range(3):
                    self._run()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            self.optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(self.graph):
                self.loss = self._run()

    @staticmethod
    def _parts(chats: ChatArray) -> tuple[Any, Any, Any]:
        return chats.ids, chats.learned, chats.targets

    def _fill(self, batch: list[ChatArray]) -> None:
        for tensors, chats in zip(self.inputs, batch, strict=True):
            for tensor, array in zip(tensors, self._parts(chats), strict=True):
                tensor.copy_(self.torch.from_numpy(array))

    def _run(self) -> Any:
        """Forward, backward and update on what `inputs` hold; gives the mean loss a learned token."""
        torch = self.torch
        self.optimizer.zero_grad(set_to_none=True)
        count = sum((targets != IGNORE).sum() for _, _, targets in self.inputs)
        total = torch.zeros((), device=self.device)
        for ids, learned, targets in self.inputs:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device != "cpu", cache_enabled=False):
                logits = self.model.lm_head(self._hidden(ids).flatten(0, 1)[learned])  # no head for the other rows
            loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum") / count
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return total

    def _hidden(self, ids: Any) -> Any:
        """The layers one by one: the model's own loop would build a mask, which plain causal attention needs not."""
        body = self.model.model
        hidden = body.embed_tokens(ids)
        turns = body.rotary_emb(hidden, self.torch.arange(ids.shape[1], device=ids.device)[None])
        for layer in body.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=turns)
        return body.norm(hidden)

    def __call__(self, batch: list[ChatArray], rate: float) -> Any:
        self._fill(batch)
        self.rate.fill_(rate)
        if self.graph is None:
            return self._run()
        self.graph.replay()
        return self.loss


def train(
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    device: str = "cpu",
    workers: int = 0,
    graphed: bool = False,
    seconds: float = math.inf,
    on_step: Callable[[int, float], None] | None = None,
) -> Any:
    """Train a fresh model and return it in fp32; KeyboardInterrupt ends early and returns what there is.

    `graphed` needs a GPU and replays one CUDA graph a step. With `seconds` the learning rate falls with the clock
    where that is ahead of the steps, and the run ends in time.
    `on_step(step, loss)` is told the mean loss a learned token, every step on the CPU and every 50th on a GPU.
    """
    torch = require("torch", "export")
    batches = _batches(tokenizer, recipe, workers)
    if device != "cpu":
        torch.set_float32_matmul_precision("high")
    model = make_model(recipe).to(device).train()
    report_every = 1 if device == "cpu" else 50
    take: _Step | None = None
    try:
        for step, batch in enumerate(tqdm(batches, total=recipe.steps, desc="training", mininterval=2.0)):
            if take is None:
                take, started = _Step(model, recipe, batch, device, graphed), time.monotonic()
            done = max(step / recipe.steps, (time.monotonic() - started) / seconds)
            if done >= 1:
                break
            loss = take(batch, learning_rate(done, recipe))
            if on_step and step % report_every == 0:
                on_step(step, float(loss))
    except KeyboardInterrupt:
        print("interrupted: keeping what was learned so far", file=sys.stderr)
    return model.eval()


def save(model: Any, tokenizer: Tokenizer, out: Path) -> None:
    """Write the checkpoint in half precision to a folder beside `out`, then rename it: it is there whole or not."""
    torch, transformers = require("torch", "export"), require("transformers", "export")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model = model.to("cpu", torch.float16)
        end, pad = SPECIAL.index(END), SPECIAL.index(PAD)
        model.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=pad)
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder, model.config.max_position_embeddings)
        folder.chmod(0o755)  # mkdtemp and safetensors write for the owner alone
        for file in folder.iterdir():
            file.chmod(0o644)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m llmlab.zoo.train", description="Train tinychat")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="chats a step")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--workers", type=int, help="processes that make text; default: all cores but two")
    parser.add_argument("--eager", action="store_true", help="on cuda, launch kernels one by one: no CUDA graph")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end in this time, with fewer steps if need be")
    given = parser.parse_args(arguments)
    try:
        if given.out.exists() and not (given.out.is_dir() and not any(given.out.iterdir())):
            raise InputError(f"--out {given.out} exists already: name a new folder")
        if given.steps < 1 or given.batch < 1 or not given.minutes > 0:
            raise InputError(f"--steps {given.steps} --batch {given.batch} --minutes {given.minutes}: all must be > 0")
        recipe = Recipe(steps=given.steps, batch=given.batch, seed=given.seed)
        torch = require("torch", "export")
        device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
        workers = max(0, (os.cpu_count() or 1) - 2) if given.workers is None else given.workers
        tokenizer = make_tokenizer(recipe)
        started, last = time.monotonic(), (0, 0.0)

        def report(step: int, loss: float) -> None:
            nonlocal last
            last = step, loss
            if step % 500 == 0:
                tqdm.write(f"step {step:6d}  loss {loss:.4f}  {time.monotonic() - started:.0f} s")

        graphed, seconds = device != "cpu" and not given.eager, 60 * given.minutes
        model = train(
            recipe, tokenizer, device=device, workers=workers, graphed=graphed, seconds=seconds, on_step=report
        )
        save(model, tokenizer, given.out)
    except LlmlabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{given.out}: {count:,} parameters, loss {last[1]:.4f} at step {last[0]}, {time.monotonic() - started:.0f} s"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
