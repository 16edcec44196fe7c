"""What to quantize, and how: a recipe, as a name, a dict or a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmlab.quant.parse import fields_of
from llmlab.quant.scheme import Activations, KVCache, Override, Weights, needs_calibration, one_of

PRECISIONS = ("float16", "bfloat16")
KEPT = ("embedding", "head", "router", "small")
"""Roles of projections that stay wide unless an override names them: they are few, and errors in them cost most."""


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
            one_of("precision", self.precision, PRECISIONS)

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
        return given if isinstance(given, Recipe) else cls(**fields_of(given))

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
