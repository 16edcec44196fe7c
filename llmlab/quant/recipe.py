"""What to quantize, and how: a recipe, as a name, a dict or a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmlab.errors import InputError
from llmlab.quant.grid import Grid

METHODS = ("rtn", "gptq", "awq")
SCALES = ("absmax", "percentile", "mse")
PRECISIONS = ("float16", "bfloat16")
KEPT = ("embedding", "head", "router", "small")
"""Roles of projections that stay wide unless an override names them: they are few, and errors in them cost most."""


@dataclass(frozen=True)
class Weights:
    """How weights are rounded.

    dtype: int8, int4, int3 or fp8. group: numbers of a row that share a scale (16 to 256); 0: as `per` says, a scale a
    row (`channel`) or for the whole matrix (`tensor`). symmetric: without a zero point. method: `rtn` (to nearest), `gptq`
    or `awq`. damping, act_order: of GPTQ. clip: whether AWQ searches what to clip. sequential: whether a calibration goes on with the
    rounded weight, so that layers behind it are solved for what they will be given.
    """

    dtype: str = "int8"
    group: int = 0
    symmetric: bool = True
    method: str = "rtn"
    per: str = "channel"
    damping: float = 0.01
    act_order: bool = True
    clip: bool = True
    sequential: bool = True

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        for name in ("symmetric", "act_order", "clip", "sequential"):
            _flag(name, getattr(self, name))
        _number("damping", self.damping, 0.0, 1.0)
        _ = self.grid

    @property
    def grid(self) -> Grid:
        return Grid(self.dtype, self.group, self.symmetric, self.per)

    def __str__(self) -> str:
        shared = f"g{self.group}" if self.group else f"per {self.per}"
        return f"{self.dtype} {shared}{'' if self.symmetric else ' asymmetric'} ({self.method})"


@dataclass(frozen=True)
class Activations:
    """How what a product multiplies is rounded.

    dtype: int8 or fp8. dynamic: the scale of each token (per="token") is computed in the step; else one scale (per="tensor")
    is chosen from a calibration. smooth: SmoothQuant's strength, 0 to 1, with which outliers go into the weights; None: not.
    scale: how a static one is chosen: `absmax` (the largest number seen), `percentile` (99.99 % of the magnitudes lie below) or `mse`
    (least squared error).
    """

    dtype: str = "int8"
    per: str = "tensor"
    dynamic: bool = False
    smooth: float | None = None
    scale: str = "mse"

    def __post_init__(self) -> None:
        _one_of("activations.dtype", self.dtype, ("int8", "fp8"))
        _one_of("activations.per", self.per, ("tensor", "token"))
        _flag("dynamic", self.dynamic)
        if self.dynamic != (self.per == "token"):
            raise InputError(
                f"activations are per {self.per} and {'dynamic' if self.dynamic else 'static'}; expected per token and dynamic "
                "(computed in the step) or per tensor and static (from a calibration)"
            )
        if self.smooth is not None:
            _number("smooth", self.smooth, 0.0, 1.0)
        _one_of("activations.scale", self.scale, SCALES)

    @property
    def grid(self) -> Grid:
        return Grid(self.dtype, per="tensor")

    def __str__(self) -> str:
        smooth = "" if self.smooth is None else f", smoothed {self.smooth:g}"
        return f"{self.dtype} per {self.per}{smooth}"


@dataclass(frozen=True)
class KVCache:
    """How keys and values are kept. dtype: int8, fp8 or int4. per: what shares a scale, `tensor`, `head` or `channel`."""

    dtype: str = "int8"
    per: str = "tensor"

    def __post_init__(self) -> None:
        _one_of("kv_cache.dtype", self.dtype, ("int8", "fp8", "int4"))
        _one_of("kv_cache.per", self.per, ("tensor", "head", "channel"))

    def __str__(self) -> str:
        return f"{self.dtype} per {self.per}"


def needs_calibration(weights: Weights | None, activations: Activations | None) -> bool:
    """Whether inputs have to be seen before a projection can be quantized like this."""
    if weights is not None and weights.method != "rtn":
        return True
    return activations is not None and (not activations.dynamic or activations.smooth is not None)


@dataclass(frozen=True)
class Override:
    """What some projections get instead, those whose name or role `pattern` matches (`*.down_proj`, `head`); None: nothing,
    they stay wide. Where several match, the last one counts."""

    pattern: str
    weights: Weights | None = None
    activations: Activations | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise InputError(f"pattern is {self.pattern!r}, expected a name with wildcards, such as *.down_proj")


@dataclass(frozen=True)
class Recipe:
    """What to quantize, and how.

    weights, activations: of all projections but those that `layers` and `keep` name; None: wide. kv_cache: None: as the graph
    has it. layers: overrides. keep: patterns and roles that stay wide unless an override names them. precision: float16 or
    bfloat16, what the graph is converted to first. name: what reports call it.
    """

    weights: Weights | None = None
    activations: Activations | None = None
    kv_cache: KVCache | None = None
    layers: tuple[Override, ...] = ()
    keep: tuple[str, ...] = KEPT
    precision: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.precision is not None:
            _one_of("precision", self.precision, PRECISIONS)

    @property
    def needs_calibration(self) -> bool:
        """Whether activations have to be seen before this recipe can be applied."""
        given = [(self.weights, self.activations), *((o.weights, o.activations) for o in self.layers)]
        return self.kv_cache is not None or any(needs_calibration(*asked) for asked in given)

    @classmethod
    def parse(cls, given: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
        """A recipe from its name (`int4_awq`, `int8_smoothquant+kv_int8`), a dict as `to_dict` gives, or the path of such a
        YAML file (`.yaml`, `.yml`).

        To a name may be added `_g64` (group size), `_asym` (with a zero point), `_tensor` (one scale a matrix) or, to kv_…,
        `_head` or `_channel`. A dict may have `base`, the name of the recipe that it changes, and `layers` as
        {pattern: name | dict | None}. Raises InputError that says what isn't known, with what is near it.
        """
        from llmlab.quant.parse import parse

        return parse(given)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `parse` takes it; what is None or nothing is left out."""
        given = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in given.items() if value or key == "keep"}

    def to_yaml(self) -> str:
        """The recipe as a YAML file."""
        import yaml

        return str(yaml.safe_dump(self.to_dict(), sort_keys=False))

    def __str__(self) -> str:
        activations = f"activations {self.activations}" if self.activations else ""
        kv_cache = f"KV cache {self.kv_cache}" if self.kv_cache else ""
        parts = (self.precision, self.weights, activations, kv_cache)
        said = ", ".join(str(part) for part in parts if part) or "nothing"
        return f"{self.name}: {said}" if self.name else said


def _one_of(what: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{what} is {value!r}; available: {', '.join(known)}")


def _flag(what: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{what} is {value!r}, expected true or false")


def _number(what: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise InputError(f"{what} is {value!r}, expected a number from {least:g} to {most:g}")
