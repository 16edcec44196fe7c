"""How weights, activations and keys and values are rounded: the parts of a recipe, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmlab.errors import InputError
from llmlab.quant.grid import Grid

METHODS = ("rtn", "gptq", "awq")
SCALES = ("absmax", "percentile", "mse")


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
        one_of("method", self.method, METHODS)
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
        one_of("activations.dtype", self.dtype, ("int8", "fp8"))
        one_of("activations.per", self.per, ("tensor", "token"))
        _flag("dynamic", self.dynamic)
        if self.dynamic != (self.per == "token"):
            raise InputError(
                f"activations are per {self.per} and {'dynamic' if self.dynamic else 'static'}; expected per token and dynamic "
                "(computed in the step) or per tensor and static (from a calibration)"
            )
        if self.smooth is not None:
            _number("smooth", self.smooth, 0.0, 1.0)
        one_of("activations.scale", self.scale, SCALES)

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
        one_of("kv_cache.dtype", self.dtype, ("int8", "fp8", "int4"))
        one_of("kv_cache.per", self.per, ("tensor", "head", "channel"))

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


def one_of(what: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{what} is {value!r}; available: {', '.join(known)}")


def _flag(what: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{what} is {value!r}, expected true or false")


def _number(what: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise InputError(f"{what} is {value!r}, expected a number from {least:g} to {most:g}")
