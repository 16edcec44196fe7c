"""The fields of a recipe from its name, a dict or a YAML file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from llmlab.errors import InputError, nearest
from llmlab.files import read_bytes
from llmlab.quant.scheme import METHODS, Activations, KVCache, Override, Weights

Fields = dict[str, Any]
FIELDS = ("weights", "activations", "kv_cache", "layers", "keep", "precision", "name")
"""Of a recipe."""


def fields_of(given: object) -> Fields:
    """What `Recipe.parse` says; what is not named is left out."""
    if isinstance(given, Path) or (isinstance(given, str) and given.endswith((".yaml", ".yml"))):
        return _from_yaml(Path(given))
    if isinstance(given, str):
        return _from_name(given)
    if isinstance(given, Mapping):
        return _from_dict(given)
    raise InputError(f"recipe is a {type(given).__name__}; expected a name, a dict, a .yaml path or a Recipe")


_PRESETS: dict[str, dict[str, Any]] = {
    "int8": {"weights": Weights()},
    **{
        f"{dtype}_{method}": {"weights": Weights(dtype, 32, method=method)}
        for dtype in ("int4", "int3")
        for method in METHODS
    },
    "int8_dynamic": {"weights": Weights(), "activations": Activations("int8", "token", True)},
    "int8_w8a8": {"weights": Weights(), "activations": Activations("int8")},
    "int8_smoothquant": {"weights": Weights(), "activations": Activations("int8", smooth=0.9, scale="absmax")},
    "int8_smoothquant_dynamic": {"weights": Weights(), "activations": Activations("int8", "token", True, 0.8)},
    "fp8": {"weights": Weights("fp8"), "activations": Activations("fp8")},
    "fp8_dynamic": {"weights": Weights("fp8"), "activations": Activations("fp8", "token", True)},
    "fp8_weights": {"weights": Weights("fp8")},
    "fp16": {"precision": "float16"},
    "bf16": {"precision": "bfloat16"},
    **{f"kv_{dtype}": {"kv_cache": KVCache(dtype)} for dtype in ("int8", "fp8", "int4")},
}
_CHANGES: dict[str, dict[str, Any]] = {"asym": {"symmetric": False}, "tensor": {"per": "tensor", "group": 0}}
PRESETS = tuple(_PRESETS)
"""Names of the recipes that there are."""


def _from_name(text: str) -> Fields:
    found: dict[str, Any] = {}
    for name in text.split("+"):
        for key, value in _preset(name.strip()).items():
            if key in found:
                raise InputError(
                    f"recipe {text!r} says twice what {key} is: join names that are about different things"
                )
            found[key] = value
    return {**found, "name": text}


def _preset(name: str) -> dict[str, Any]:
    base, changes = name, []
    while base not in _PRESETS:
        base, mark, change = base.rpartition("_")
        if not mark or not base:
            raise InputError(f"no recipe is named {name!r}; {nearest(name, PRESETS)}")
        changes.append(change)
    found = dict(_PRESETS[base])
    for change in changes:
        if change in ("head", "channel", "tensor") and "kv_cache" in found:
            found["kv_cache"] = replace(found["kv_cache"], per=change)
            continue
        options = _CHANGES.get(change)
        if change[:1] == "g" and change[1:].isascii() and change[1:].isdigit():
            options = {"group": int(change[1:])}
        if options is None or "weights" not in found:
            raise InputError(f"no recipe is named {name!r}; {nearest(name, PRESETS)}")
        found["weights"] = replace(found["weights"], **options)
    return found


def _from_yaml(path: Path) -> Fields:
    import yaml

    try:
        given = yaml.safe_load(read_bytes(path, InputError, 1 << 20))
    except (yaml.YAMLError, UnicodeError, RecursionError, ValueError) as problem:
        if isinstance(problem, InputError):
            raise
        raise InputError(f"{path}: not valid YAML ({' '.join(str(problem).split())})") from problem
    if not isinstance(given, Mapping):
        raise InputError(
            f"{path}: holds a {type(given).__name__}; expected a recipe, such as `weights: {{dtype: int4}}`"
        )
    try:
        return _from_dict({"name": path.stem, **given})
    except InputError as problem:
        raise InputError(f"{path}: {problem}") from problem


def _from_dict(given: Mapping[str, Any]) -> Fields:
    data = dict(given)
    changes = {**_from_name(_text("base", data.pop("base"))), "name": ""} if "base" in data else {}
    _known("a recipe", data, FIELDS)
    for key, value in data.items():
        if key in ("weights", "activations", "kv_cache"):
            changes[key] = _part(key, value)
        elif key == "layers":
            changes[key] = _layers(value)
        elif key == "keep":
            if not isinstance(value, (list, tuple)):
                raise InputError(f"keep is {value!r}, expected a list of roles and patterns")
            changes[key] = tuple(_text("keep", v) for v in value)
        else:
            changes[key] = None if value is None else _text(key, value)
    return changes


def _layers(given: Any) -> tuple[Override, ...]:
    if isinstance(given, Mapping):
        return tuple(_override(_text("a pattern", pattern), value) for pattern, value in given.items())
    if isinstance(given, (list, tuple)) and all(isinstance(v, (Mapping, Override)) for v in given):
        return tuple(
            v
            if isinstance(v, Override)
            else _override(_text("pattern", v.get("pattern")), {k: w for k, w in v.items() if k != "pattern"})
            for v in given
        )
    raise InputError(f"layers is {given!r}, expected {{pattern: recipe}}, such as {{'*.down_proj': 'int8'}}")


def _override(pattern: str, given: Any) -> Override:
    if given is None:
        return Override(pattern)
    if isinstance(given, str):
        found = _from_name(given)
        if found.keys() & {"kv_cache", "precision"}:
            raise InputError(f"layers {pattern!r}: {given!r} is of the whole model; expected weights and activations")
        return Override(pattern, found.get("weights"), found.get("activations"))
    if not isinstance(given, Mapping):
        raise InputError(f"layers {pattern!r} is {given!r}, expected a recipe's name, a dict or null")
    _known(f"layers {pattern!r}", given, ("weights", "activations"))
    return Override(pattern, **{key: _part(key, value) for key, value in given.items()})


_PARTS: dict[str, type] = {"weights": Weights, "activations": Activations, "kv_cache": KVCache}


def _part(key: str, given: Any) -> Any:
    kind = _PARTS[key]
    if given is None or isinstance(given, kind):
        return given
    if isinstance(given, str):
        found = _from_name(given).get(key)
        if found is None:
            raise InputError(f"{key} is {given!r}, a recipe that says nothing of it")
        return found
    if not isinstance(given, Mapping):
        raise InputError(f"{key} is {given!r}, expected a dict such as {{'dtype': 'int8'}}")
    _known(key, given, [f.name for f in fields(kind)])
    return kind(**given)


def _known(what: str, given: Mapping[Any, Any], names: Iterable[str]) -> None:
    names = tuple(names)
    for key in given:
        if key not in names:
            raise InputError(f"{what} has no {key!r}; {nearest(str(key), names)}")


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{what} is {value!r}, expected a text")
    return value
