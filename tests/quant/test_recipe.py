"""Recipes: names, dicts, YAML, and what is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmlab.errors import InputError
from llmlab.quant.parse import PRESETS
from llmlab.quant.recipe import Recipe
from llmlab.quant.scheme import Activations, KVCache, Override, Weights


@pytest.mark.parametrize("name", [*PRESETS, "int4_awq_g128_asym+kv_fp8_head", "fp16+int8"])
def test_every_name_comes_back_from_data_and_from_yaml(name: str, tmp_path: Path) -> None:
    recipe = Recipe.parse(name)
    assert recipe.name == name and name in str(recipe)
    assert Recipe.parse(recipe.to_dict()) == recipe == Recipe.parse(recipe)
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml())
    assert Recipe.parse(tmp_path / "mine.yaml") == recipe == Recipe.parse(str(tmp_path / "mine.yaml"))


def test_what_names_mean() -> None:
    assert Recipe.parse("int8").weights == Weights("int8")
    assert Recipe.parse("int4_gptq").weights == Weights("int4", 32, method="gptq")
    assert Recipe.parse("int3_rtn_g128_asym").weights == Weights("int3", 128, symmetric=False)
    both = Recipe.parse("int8_smoothquant+kv_int8_channel")
    assert both.activations == Activations("int8", smooth=0.9, scale="absmax") and both.kv_cache == KVCache(
        "int8", "channel"
    )
    assert Recipe.parse("fp8_weights_tensor").weights == Weights("fp8", per="tensor")
    assert Recipe.parse("bf16").precision == "bfloat16"


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        *((n, False) for n in ("int8", "int4_rtn", "int8_dynamic", "fp16", "fp8_dynamic")),
        *((n, True) for n in ("int4_awq", "int8_w8a8", "int8_smoothquant_dynamic", "fp8", "kv_int8")),
    ],
)
def test_which_need_a_calibration(name: str, needed: bool) -> None:
    assert Recipe.parse(name).needs_calibration is needed
    overridden = Recipe.parse({"layers": {"*": name}}) if name not in ("fp16", "kv_int8") else Recipe.parse(name)
    assert overridden.needs_calibration is needed


def test_layers() -> None:
    recipe = Recipe.parse({"base": "int4_rtn", "layers": {"*.down_proj": "int8", "head": None}, "keep": []})
    assert recipe.layers == (Override("*.down_proj", Weights("int8")), Override("head"))
    assert recipe.keep == () and recipe.weights == Weights("int4", 32)
    again = Recipe.parse({"layers": [{"pattern": "*.q_proj", "weights": {"dtype": "int3", "group": 64}}]})
    assert again.layers == (Override("*.q_proj", Weights("int3", 64)),)
    assert Recipe.parse({"weights": "int4_awq_g64", "layers": [Override("head")]}).weights == Weights(
        "int4", 64, method="awq"
    )
    assert Recipe.parse(recipe.to_dict()) == recipe and Recipe.parse(again.to_dict()) == again


def test_a_file_is_called_after_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text("weights: {dtype: int4, group: 64}\nlayers:\n  '*.down_proj': int8\n")
    assert Recipe.parse(tmp_path / "mine.yml").name == "mine"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("int4_awk", "no recipe is named 'int4_awk'; nearest: int4_awq"),
        ("int4", "no recipe is named 'int4'; nearest: .*int4_rtn"),
        ("int8+int4_rtn", "'int8\\+int4_rtn' says twice what weights is"),
        ("int4_rtn_g48", "group is 48; available: 0"),
        ("fp8_weights_asym", "fp8 has no zero point"),
        ("kv_int8_g32", "no recipe is named 'kv_int8_g32'"),
        ("", "no recipe is named ''"),
        (7, "recipe is a int; expected a name, a dict"),
        ({"wieghts": None}, "a recipe has no 'wieghts'; nearest: weights"),
        ({"weights": {"bits": 4}}, "weights has no 'bits'; "),
        ({"weights": {"dtype": "int5"}}, "dtype is 'int5'; available: int8, int4, int3, fp8"),
        ({"weights": {"dtype": ["int8"]}}, "dtype is \\['int8'\\]"),
        ({"weights": {"symmetric": 1}}, "symmetric is 1, expected true or false"),
        ({"weights": {"method": "awk"}}, "method is 'awk'; available: rtn, gptq, awq"),
        ({"weights": {"damping": "much"}}, "damping is 'much', expected a number from 0 to 1"),
        ({"weights": 4}, "weights is 4, expected a dict"),
        ({"weights": "kv_int8"}, "weights is 'kv_int8', a recipe that says nothing of it"),
        ({"activations": {"per": "tensor", "dynamic": True}}, "expected per token and dynamic"),
        ({"activations": {"per": "token"}}, "activations are per token and static"),
        ({"activations": {"smooth": 2}}, "smooth is 2, expected a number from 0 to 1"),
        ({"kv_cache": {"dtype": "int3"}}, "kv_cache.dtype is 'int3'; available: int8, fp8, int4"),
        ({"layers": "*"}, "layers is '\\*', expected {pattern: recipe}"),
        ({"layers": {"*": "kv_int8"}}, "'kv_int8' is of the whole model"),
        ({"layers": {"*": 3}}, "layers '\\*' is 3, expected a recipe's name"),
        ({"layers": {"": None}}, "pattern is '', expected a name with wildcards"),
        ({"layers": {3: None}}, "a pattern is 3, expected a text"),
        ({"layers": {"*": {"weigths": "int8"}}}, "layers '\\*' has no 'weigths'; nearest: weights"),
        ({"keep": "head"}, "keep is 'head', expected a list"),
        ({"precision": "float64"}, "precision is 'float64'; available: float16, bfloat16"),
        ({"base": 3}, "base is 3, expected a text"),
    ],
)
def test_recipes_that_are_none(given: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        Recipe.parse(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("weights: [", "not valid YAML"),
        ("- int8\n", "holds a list; expected a recipe"),
        ("", "holds a NoneType"),
        ("weights: {dtype: int9}", "dtype is 'int9'"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_files_that_hold_none(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=reason) as caught:
        Recipe.parse(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe.yaml: can't be read"):
        Recipe.parse(tmp_path / "recipe.yaml")
