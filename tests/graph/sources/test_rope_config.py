"""RoPE that depends on a sequence's length: one set of frequencies is chosen, or the model is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import steps
import tiny
from typer.testing import CliRunner

from llmlab import cli
from llmlab.config import ModelConfig
from llmlab.errors import InputError, UnsupportedModelError
from llmlab.graph.export import export
from llmlab.graph.graph import Graph
from llmlab.graph.interpret import Interpreter
from llmlab.graph.optimize import optimize
from llmlab.graph.sources.rope_config import freeze_rope, rope_limit

SHORT, LONG = [1.0 + i / 10 for i in range(8)], [4.0, 3.0, 2.0, 1.5, 1.0, 1.0, 1.0, 1.0]


def longrope(short: list[float] = SHORT, long: list[float] = LONG) -> dict[str, Any]:
    scaling = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long}
    original = {"original_max_position_embeddings": 32}
    return {"rope_parameters": {**scaling, **original}, **original}


@pytest.mark.parametrize(("longest", "limit", "kept"), [(None, 32, SHORT), (32, 32, SHORT), (33, None, LONG)])
def test_the_longest_sequence_chooses_the_factors(longest: int | None, limit: int | None, kept: list[float]) -> None:
    raw = longrope()
    assert rope_limit(raw, longest) == limit
    config = SimpleNamespace(**longrope())
    freeze_rope(config, limit or 64)
    assert config.rope_parameters["short_factor"] == config.rope_parameters["long_factor"] == kept


def test_older_spellings_and_settings_by_layer_are_understood() -> None:
    older = {"rope_scaling": {"type": "su", "short_factor": SHORT, "long_factor": LONG}}
    assert rope_limit({**older, "original_max_position_embeddings": 16}, None) == 16
    assert rope_limit({"rope_parameters": {"full_attention": longrope()["rope_parameters"]}}, None) == 32
    assert rope_limit({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 16}}, None) is None
    assert rope_limit({"rope_scaling": None}, None) is None


def test_frequencies_that_change_as_a_sequence_grows_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="llama: its RoPE scaling is 'dynamic'") as caught:
        rope_limit({"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("longest", [0, -1, 65, True, "8"])
def test_lengths_that_cannot_be_are_refused(longest: Any) -> None:
    config = ModelConfig("toy", 12, 8, 1, 2, 64)
    with pytest.raises(InputError, match="max_seq_len is"):
        config.limited(longest)
    assert config.limited(None) is config and config.limited(8).max_position_embeddings == 8
    assert ModelConfig.from_hf(ModelConfig.from_hf(tiny._COMMON | {"model_type": "x"}).limited(8).to_dict()) is not None


def errors(serving: Any, plan: steps.Plan, expected: list[np.ndarray]) -> float:
    interpreter = Interpreter(serving, num_blocks=48, block_size=4)
    found = [
        steps.worst_error(interpreter.step(steps.feeds(batch)), np.array([expected[b][i] for b, i in rows]))
        for batch, rows in steps.batches(plan, tiny.VOCAB, steps.paged_tables(plan, 4, 48), steps.all_rows)
    ]
    return max(found)


def test_the_command_line_chooses_too(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "c", {"model_type": "phi3", "num_hidden_layers": 1, **longrope()})
    arguments = ["export", str(folder), "-o", str(tmp_path / "plain"), "--max-seq-len", "64"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert Graph.load(tmp_path / "plain").config.max_position_embeddings == 64


@pytest.mark.slow
def test_short_and_long_factors_equal_transformers(tmp_path: Path) -> None:
    """The oracle of the long factors has them for short sequences too: its own cache would mix both."""
    folder = tiny.write_checkpoint(tmp_path / "c", {"model_type": "phi3", **longrope()})
    short, long = optimize(export(folder)), optimize(export(folder, max_seq_len=64))
    assert short.config.max_position_embeddings == 32 and long.config.max_position_embeddings == 64
    up_to_32 = steps.Plan(((9, 1, 1), (1, 1, 0), (0, 16, 16)))
    of_short = steps.cached_generation(tiny.make_model({"model_type": "phi3", **longrope()}), up_to_32, tiny.VOCAB)
    all_long = tiny.make_model({"model_type": "phi3", **longrope(short=LONG)})
    of_long = steps.cached_generation(all_long, steps.RAGGED, tiny.VOCAB)
    assert errors(short, up_to_32, of_short) < 1e-4
    assert errors(long, steps.RAGGED, of_long) < 1e-4
    assert errors(long, up_to_32, of_short) > 1e-2, "the two sets of factors must be told apart"
