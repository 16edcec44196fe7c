"""How an engine for TensorRT is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from llmlab.errors import InputError

Attention = Literal["plugin", "piecewise", "native"]
Products = Literal["kernels", "tensorrt"]
Precision = Literal["float16", "bfloat16", "float32"]
Range = tuple[int, int, int]
"""Smallest, most usual and largest size of a dimension."""
Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""Of each input that has a dynamic shape: the smallest shape, the one to optimize for, the largest."""

BLOCK_SIZES = (16, 32, 64, 128)
_MOST = 1 << 20


@dataclass(frozen=True)
class BuildConfig:
    """How an engine for `target="tensorrt"` or `"tensorrt-rtx"` is built. Checked when it is made: InputError.

    What is None is chosen for the model and the TensorRT that builds.
    """

    max_batch: int = 64
    """Sequences in a step, at most."""
    max_tokens_per_step: int = 2048
    """New tokens in a step, at most: how prompts are chunked."""
    max_seq_len: int | None = None
    """Tokens of a sequence, prompt and output together."""
    decode_buckets: tuple[int, ...] = (1,)
    """Batch sizes of decode steps that get a profile, and so kernels, of their own. Each costs build time."""
    block_size: int = 64
    """Tokens in a block of the KV pool."""
    attention: Attention | None = None
    """How PagedAttention is hosted: as a plugin in one engine, between pieces, or by TensorRT's own operators."""
    products: Products | None = None
    """What computes large linear layers and RMS norms: kernels of ours, in piecewise hosting in float16 or bfloat16, where identical layers
    then share what TensorRT compiles and all weights lie in one file; or TensorRT. None: kernels where they can."""
    precision: Precision = "float16"
    optimization_level: int | None = None
    """0 to 5: how long TensorRT looks for faster kernels. None: 5 where products are kernels of ours, else its own default."""
    workspace_bytes: int | None = None
    """Scratch memory of a kernel, at most."""
    timing_cache: Path | None = None
    """A file that remembers what was measured, so that the next build is shorter. Made if it isn't there."""
    compute_capabilities: tuple[tuple[int, int], ...] = ()
    """GPUs to build for, such as (8, 9). None given: the one in this machine."""
    refit: bool = False
    """Keep the engine open to other weights of the same shapes (`llmlab.tensorrt.refit`)."""

    def __post_init__(self) -> None:
        _integer("max_batch", self.max_batch, 1, 4096)
        _integer("max_tokens_per_step", self.max_tokens_per_step, 1, 1 << 16)
        if self.max_tokens_per_step < self.max_batch:
            raise InputError(
                f"max_tokens_per_step is {self.max_tokens_per_step}, expected at least max_batch, {self.max_batch}: a decode step has a token of each sequence"
            )
        _optional("max_seq_len", self.max_seq_len, 1, _MOST)
        _optional("optimization_level", self.optimization_level, 0, 5)
        _optional("workspace_bytes", self.workspace_bytes, 1 << 20, 1 << 40)
        _one_of("block_size", self.block_size, BLOCK_SIZES)
        _one_of("attention", self.attention, (None, *get_args(Attention)))
        _one_of("products", self.products, (None, *get_args(Products)))
        _one_of("precision", self.precision, get_args(Precision))
        _one_of("refit", self.refit, (False, True))
        self._set("decode_buckets", _tuple("decode_buckets", self.decode_buckets))
        for bucket in self.decode_buckets:
            _integer("a decode bucket", bucket, 1, self.max_batch)
        self._set("decode_buckets", tuple(sorted(set(self.decode_buckets))))
        self._set(
            "compute_capabilities",
            tuple(_capability(c) for c in _tuple("compute_capabilities", self.compute_capabilities)),
        )
        if self.timing_cache is not None:
            if not isinstance(self.timing_cache, str | Path):
                raise InputError(f"timing_cache is {self.timing_cache!r}, expected the path of a file")
            self._set("timing_cache", Path(self.timing_cache))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def ranges(self) -> tuple[dict[str, Range], ...]:
        """Of each profile the sizes of a step: `T` new tokens, `B` sequences, `N` rows whose logits are wanted, `B1` = B + 1.

        One profile a decode bucket, in which every size is exact, then one for all other steps.
        """
        wide = {
            "T": (1, self.max_tokens_per_step, self.max_tokens_per_step),
            "B": (1, self.max_batch, self.max_batch),
            "N": (1, self.max_batch, self.max_batch),
            "B1": (2, self.max_batch + 1, self.max_batch + 1),
        }
        exact = ({"T": (b, b, b), "B": (b, b, b), "N": (b, b, b), "B1": (b + 1,) * 3} for b in self.decode_buckets)
        return (*exact, wide)

    def profiles(
        self, inputs: Mapping[str, Sequence[int | str]], sizes: Mapping[str, Range] | None = None
    ) -> list[Profile]:
        """The profiles of inputs whose shapes are given as numbers and names: those of `ranges`, and those in `sizes`."""
        made = []
        for ranges in self.ranges():
            known = {**ranges, **(sizes or {})}
            made.append({name: _shapes(name, shape, known) for name, shape in inputs.items()})
        return [profile for i, profile in enumerate(made) if profile not in made[:i]]

    def to_dict(self) -> dict[str, Any]:
        """For a manifest: JSON types alone."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        cache = None if self.timing_cache is None else str(self.timing_cache)
        capabilities = [list(pair) for pair in self.compute_capabilities]
        return plain | {
            "timing_cache": cache,
            "compute_capabilities": capabilities,
            "decode_buckets": list(self.decode_buckets),
        }


def _shapes(name: str, shape: Sequence[int | str], known: Mapping[str, Range]) -> tuple[Shape, Shape, Shape]:
    for size in shape:
        if isinstance(size, str) and size not in known:
            raise InputError(f"input {name} has the size {size!r}, known: {', '.join(sorted(known))}")
    low, usual, high = (tuple(known[s][i] if isinstance(s, str) else s for s in shape) for i in range(3))
    return low, usual, high


def _integer(name: str, given: object, low: int, high: int) -> None:
    if isinstance(given, bool) or not isinstance(given, int) or not low <= given <= high:
        raise InputError(f"{name} is {given!r}, expected an integer from {low} to {high}")


def _optional(name: str, given: object, low: int, high: int) -> None:
    if given is not None:
        _integer(name, given, low, high)


def _one_of(name: str, given: object, known: Sequence[object]) -> None:
    if not any(given is k or (type(given) is type(k) and given == k) for k in known):
        raise InputError(f"{name} is {given!r}; available: {', '.join(str(k) for k in known)}")


def _tuple(name: str, given: object) -> tuple[Any, ...]:
    if not isinstance(given, tuple | list):
        raise InputError(f"{name} is {given!r}, expected a tuple")
    return tuple(given)


def _capability(given: object) -> tuple[int, int]:
    """(8, 9) as given or from "8.9"."""
    if isinstance(given, str) and given.replace(".", "", 1).isdecimal() and "." in given:
        given = tuple(int(part) for part in given.split("."))
    if not isinstance(given, tuple | list) or len(given) != 2 or not all(type(part) is int for part in given):
        raise InputError(f"a compute capability is {given!r}, expected a pair such as (8, 9)")
    return given[0], given[1]
