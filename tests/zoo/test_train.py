"""Training on the CPU in a tiny shape: the loss falls, an interrupt keeps the weights, a failure leaves nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from llmlab.zoo.train import Recipe, learning_rate, main, make_tokenizer, save, train

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = Recipe(
    steps=30,
    batch=24,
    hidden_size=64,
    intermediate_size=128,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=32,
    tokenizer_chats=1500,
    max_length=96,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer(TINY)


def test_the_loss_falls_and_the_result_loads(tokenizer: Tokenizer, tmp_path: Path) -> None:
    losses: list[float] = []
    model = train(TINY, tokenizer, on_step=lambda step, loss: losses.append(loss))
    assert len(losses) == TINY.steps
    assert losses[0] > 7.0  # as uncertain as ln(2048) before the first update
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5
    save(model, tokenizer, tmp_path / "new" / "tiny")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "tiny")
    assert loaded.dtype == torch.float16
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tiny"]
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].half()), name


def test_the_same_seed_gives_the_same_weights(tokenizer: Tokenizer) -> None:
    short = replace(TINY, steps=2)
    one, same, other = (train(recipe, tokenizer) for recipe in (short, short, replace(short, seed=1)))
    weights = [model.model.layers[0].mlp.up_proj.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_an_interrupt_keeps_what_was_learned(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(step: int, loss: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    model = train(TINY, tokenizer, on_step=stop)
    assert "keeping what was learned" in capsys.readouterr().err
    assert not model.training and all(torch.isfinite(p).all() for p in model.parameters())


def test_the_clock_ends_a_run(tokenizer: Tokenizer) -> None:
    steps: list[int] = []
    train(replace(TINY, steps=10_000), tokenizer, seconds=0.5, on_step=lambda step, loss: steps.append(step))
    assert 0 < len(steps) < 1000


def test_a_failed_save_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = train(replace(TINY, steps=1), tokenizer)

    def fail(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save(model, tokenizer, tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []


def test_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [learning_rate(done / 100, TINY) for done in range(101)]
    peak = rates.index(max(rates))
    assert rates[0] == 0.0 and max(rates) == TINY.learning_rate and peak == round(100 * TINY.warmup)
    assert rates[peak:] == sorted(rates[peak:], reverse=True) and abs(rates[-1]) < 1e-12


@pytest.mark.parametrize(("more", "named"), [(["--steps", "0"], "--steps 0"), ([], "name a new folder")])
def test_wrong_arguments_end_with_one_line(
    more: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    if not more:
        out.mkdir()
        (out / "precious").write_text("mine")
    assert main(["--out", str(out), *more]) == 2
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ([] if more else ["out", "precious"])
