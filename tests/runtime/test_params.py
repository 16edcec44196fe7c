"""SamplingParams: every bad value is one clear line, and plain data makes the round trip."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from llmlab.errors import InputError
from llmlab.runtime.params import SamplingParams

BAD = [
    ({"max_tokens": 0}, "max_tokens is 0, expected an integer >= 1"),
    ({"max_tokens": 1.5}, "max_tokens is 1.5, expected an integer >= 1"),
    ({"max_tokens": True}, "max_tokens is True"),
    ({"max_tokens": None}, "max_tokens is None"),
    ({"min_tokens": -1}, "min_tokens is -1"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9, expected at most max_tokens (8)"),
    ({"temperature": -0.1}, "temperature is -0.1, expected a number >= 0 and <= 100; 0 is greedy"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"temperature": "hot"}, "temperature is 'hot'"),
    ({"top_k": -1}, "top_k is -1, expected an integer >= 0; 0 turns it off"),
    ({"top_k": 2.0}, "top_k is 2.0"),
    ({"top_p": 0}, "top_p is 0.0, expected a number > 0 and <= 1; 1 turns it off"),
    ({"top_p": 1.01}, "top_p is 1.01"),
    ({"min_p": 1.5}, "min_p is 1.5"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0.0"),
    ({"presence_penalty": 3}, "presence_penalty is 3.0, expected a number >= -2 and <= 2"),
    ({"frequency_penalty": [1]}, "frequency_penalty is [1]"),
    ({"stop": ["a", ""]}, "stop holds '', expected strings of at least one character"),
    ({"stop": [3]}, "stop holds 3"),
    ({"stop": b"x"}, "stop is b'x'"),
    ({"stop": 3}, "stop is 3, expected a string or a list of strings"),
    ({"stop_token_ids": 3}, "stop_token_ids is 3, expected a list of token ids"),
    ({"stop_token_ids": [-1]}, "a value in stop_token_ids is -1"),
    ({"ignore_eos": 1}, "ignore_eos is 1, expected True or False"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**63}, "seed is 9223372036854775808"),
    ({"n": 0}, "n is 0, expected an integer >= 1"),
    ({"logprobs": -1}, "logprobs is -1"),
    ({"logit_bias": [1]}, "logit_bias is [1], expected a mapping"),
    ({"logit_bias": {"a": 1}}, "a token id in logit_bias is 'a'"),
    ({"logit_bias": {1: 101}}, "a value in logit_bias is 101.0"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_value_is_one_line(values, message):
    with pytest.raises(InputError) as caught:
        SamplingParams(**values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_long_bad_value_is_cut():
    with pytest.raises(InputError) as caught:
        SamplingParams(logit_bias=["x" * 10_000])
    assert len(str(caught.value)) < 200


def test_good_values_are_normalised():
    params = SamplingParams(
        max_tokens=np.int32(3), temperature=1, top_k=np.int64(5), stop="end", stop_token_ids=range(2), top_p=1
    )
    assert type(params.max_tokens) is int and type(params.top_k) is int and type(params.temperature) is float
    assert params.stop == ("end",) and params.stop_token_ids == (0, 1)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().seed = 1
    with pytest.raises(TypeError):
        SamplingParams(3)


@pytest.mark.parametrize(
    ("given", "defaults", "expected"),
    [
        ({}, {}, (0.0, 0, 1.0)),
        ({}, {"temperature": 0.7, "top_p": 0.8}, (0.0, 0, 0.8)),  # do_sample is False by default
        ({}, {"do_sample": True}, (1.0, 0, 1.0)),
        ({}, {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8}, (0.7, 20, 0.8)),
        ({}, {"do_sample": True, "temperature": None, "top_k": None}, (1.0, 0, 1.0)),
        ({"temperature": 0}, {"do_sample": True, "temperature": 0.7, "top_k": 20}, (0.0, 20, 1.0)),
        ({"temperature": 0.5, "top_k": 0, "top_p": 1}, {"do_sample": True, "top_k": 20, "top_p": 0.1}, (0.5, 0, 1.0)),
    ],
)
def test_resolve(given, defaults, expected):
    params = SamplingParams(**given, seed=3).resolve(defaults)
    assert (params.temperature, params.top_k, params.top_p) == expected
    assert params.seed == 3
    assert params.resolve({"do_sample": True, "temperature": 9.0}) == params


def test_resolve_refuses_bad_defaults():
    with pytest.raises(InputError, match="top_p is 7"):
        SamplingParams().resolve({"top_p": 7})


def test_round_trip_through_json():
    params = SamplingParams(stop="x", stop_token_ids=[1], logit_bias={7: -1.5}, logprobs=2, temperature=0.5, n=3)
    assert SamplingParams.from_dict(json.loads(json.dumps(params.to_dict()))) == params
    assert SamplingParams.from_dict({}) == SamplingParams()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_token": 3}, "there is no sampling parameter 'max_token': did you mean max_tokens?"),
        ({"zzz": 3}, "there is no sampling parameter 'zzz': known are max_tokens, min_tokens"),
        ({"top_k": "x"}, "top_k is 'x'"),
        ([1], "sampling parameters are [1], expected a mapping"),
    ],
)
def test_from_dict_refuses(values, message):
    with pytest.raises(InputError) as caught:
        SamplingParams.from_dict(values)
    assert message in str(caught.value)
