"""BuildConfig: what it takes, and the profiles that come of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llmlab as ll
from llmlab.errors import InputError

CONFIG = ll.BuildConfig(max_batch=8, max_tokens_per_step=32, decode_buckets=(4, 1, 4))


def test_a_profile_for_each_bucket_and_one_for_all_other_steps() -> None:
    one, four, wide = CONFIG.profiles(
        {"x": ("T", 64), "query_start": ("B1",), "pool": (2, "blocks", 16)}, {"blocks": (1, 9, 99)}
    )
    assert one["x"] == ((1, 64),) * 3 and four["x"] == ((4, 64),) * 3 and wide["x"] == ((1, 64), (32, 64), (32, 64))
    assert one["query_start"] == ((2,),) * 3 and wide["query_start"] == ((2,), (9,), (9,))
    assert one["pool"] == wide["pool"] == ((2, 1, 16), (2, 9, 16), (2, 99, 16))


def test_profiles_that_are_the_same_are_one() -> None:
    assert CONFIG.profiles({"table": (5, 64)}) == [{"table": ((5, 64),) * 3}]
    narrow = ll.BuildConfig(max_batch=1, max_tokens_per_step=1)
    assert len(narrow.profiles({"x": ("T", 64)})) == 1 and len(narrow.profiles({"x": ("T", 64), "q": ("B1",)})) == 1


def test_what_it_holds_fits_a_manifest() -> None:
    config = ll.BuildConfig(timing_cache="cache", compute_capabilities=["8.9", (12, 0)])  # type: ignore[arg-type]
    assert config.timing_cache == Path("cache") and config.compute_capabilities == ((8, 9), (12, 0))
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert config.to_dict()["compute_capabilities"] == [[8, 9], [12, 0]]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_batch": 0}, "max_batch is 0, expected an integer from 1 to 4096"),
        ({"max_batch": True}, "max_batch is True, expected an integer"),
        ({"max_batch": 64, "max_tokens_per_step": 32}, "max_tokens_per_step is 32, expected at least max_batch, 64"),
        ({"max_seq_len": "4k"}, "max_seq_len is '4k', expected an integer"),
        ({"decode_buckets": (128,)}, "a decode bucket is 128, expected an integer from 1 to 64"),
        ({"decode_buckets": 4}, "decode_buckets is 4, expected a tuple"),
        ({"block_size": 48}, "block_size is 48; available: 16, 32, 64, 128"),
        ({"block_size": 16.0}, "block_size is 16.0; available: 16, 32, 64, 128"),
        ({"attention": "flash"}, "attention is 'flash'; available: None, plugin, piecewise, native"),
        ({"precision": "fp16"}, "precision is 'fp16'; available: float16, bfloat16, float32"),
        ({"optimization_level": 6}, "optimization_level is 6, expected an integer from 0 to 5"),
        ({"workspace_bytes": 1}, "workspace_bytes is 1, expected an integer from 1048576"),
        ({"timing_cache": 3}, "timing_cache is 3, expected the path of a file"),
        ({"compute_capabilities": ("sm_89",)}, "a compute capability is 'sm_89', expected a pair such as (8, 9)"),
        ({"compute_capabilities": ((8, 9, 0),)}, "a compute capability is (8, 9, 0), expected a pair"),
        ({"refit": 1}, "refit is 1; available: False, True"),
    ],
)
def test_what_it_refuses(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        ll.BuildConfig(**given)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_a_size_that_nobody_knows() -> None:
    with pytest.raises(InputError, match="input x has the size 'S', known: B, B1, N, T"):
        CONFIG.profiles({"x": ("S", 64)})
