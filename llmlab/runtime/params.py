"""What a caller can ask of sampling, checked when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmlab.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends. A bad value raises InputError.

    temperature, top_k and top_p left at None take what the engine's generation config says, else greedy decoding.
    """

    max_tokens: int = 128
    """Most tokens to generate."""
    min_tokens: int = 0
    """The end-of-sequence and stop tokens can't be chosen before this many tokens."""
    temperature: float | None = None
    """0 is greedy."""
    top_k: int | None = None
    """Keep the k most likely tokens (ties at the cut stay in); 0 is off."""
    top_p: float | None = None
    """Keep the smallest set of most likely tokens that holds this much probability (ties stay in); 1 is off."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the most likely one; 0 is off."""
    repetition_penalty: float = 1.0
    """Divides positive, multiplies negative logits of tokens in prompt or output (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that it is in the output."""
    stop: str | Sequence[str] = ()
    """Strings that end the text; kept as a tuple. They are not part of the text."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end the output; kept as a tuple."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token."""
    seed: int | None = None
    """Same seed, same tokens, whatever else is in the batch. None draws a new one for every request."""
    n: int = 1
    """Completions a prompt; number i uses seed + i."""
    logprobs: int | None = None
    """Report the chosen token's log probability and those of this many most likely tokens, before any of the above."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids."""

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "max_tokens", checked_integer("max_tokens", self.max_tokens, low=1))
        put(self, "min_tokens", checked_integer("min_tokens", self.min_tokens, low=0))
        if self.min_tokens > self.max_tokens:
            raise InputError(
                f"min_tokens is {self.min_tokens}, expected at most max_tokens ({self.max_tokens}); raise max_tokens"
            )
        if self.temperature is not None:
            put(self, "temperature", _number("temperature", self.temperature, low=0, high=100, hint="0 is greedy"))
        if self.top_k is not None:
            put(self, "top_k", checked_integer("top_k", self.top_k, low=0, hint="0 turns it off"))
        if self.top_p is not None:
            put(self, "top_p", _number("top_p", self.top_p, above=0, high=1, hint="1 turns it off"))
        put(self, "min_p", _number("min_p", self.min_p, low=0, high=1, hint="0 turns it off"))
        penalty = _number("repetition_penalty", self.repetition_penalty, low=0.01, high=100, hint="1 turns it off")
        put(self, "repetition_penalty", penalty)
        for name in ("presence_penalty", "frequency_penalty"):
            put(self, name, _number(name, getattr(self, name), low=-2, high=2, hint="0 turns it off"))
        put(self, "stop", _stop_strings(self.stop))
        put(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if not isinstance(self.ignore_eos, bool):
            raise InputError(f"ignore_eos is {self.ignore_eos!r}, expected True or False")
        if self.seed is not None:
            put(self, "seed", checked_integer("seed", self.seed, low=0, high=2**63 - 1))
        put(self, "n", checked_integer("n", self.n, low=1))
        if self.logprobs is not None:
            put(self, "logprobs", checked_integer("logprobs", self.logprobs, low=0, hint="None turns them off"))
        if self.logit_bias is not None:
            put(self, "logit_bias", _logit_bias(self.logit_bias))

    def resolve(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Fill temperature, top_k and top_p from `defaults`, a Hugging Face generation config, where they are None."""
        if self.temperature is not None and self.top_k is not None and self.top_p is not None:
            return self

        def default(name: str, otherwise: float) -> Any:
            value = defaults.get(name)
            return otherwise if value is None else value

        filled: dict[str, Any] = {}
        if self.temperature is None:
            filled["temperature"] = default("temperature", 1.0) if defaults.get("do_sample") else 0.0
        if self.top_k is None:
            filled["top_k"] = default("top_k", 0)
        if self.top_p is None:
            filled["top_p"] = default("top_p", 1.0)
        return dataclasses.replace(self, **filled)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Make from plain data such as parsed JSON (whose logit_bias has digits in strings as keys)."""
        if not isinstance(values, Mapping):
            raise InputError(f"sampling parameters are {_short(values)}, expected a mapping of names to values")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise InputError(f"there is no sampling parameter {name!r}: {hint}")
        values = dict(values)
        bias = values.get("logit_bias")
        if isinstance(bias, Mapping):
            values["logit_bias"] = {int(k) if isinstance(k, str) and k.isdecimal() else k: v for k, v in bias.items()}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data; `from_dict` makes an equal object of it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["stop"] = list(self.stop)
        values["stop_token_ids"] = list(self.stop_token_ids)
        values["logit_bias"] = None if self.logit_bias is None else dict(self.logit_bias)
        return values


def _short(value: object) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."


def _expected(kind: str, low: float | None, above: float | None, high: float | None, hint: str | None) -> str:
    bounds = [f"> {above}"] * (above is not None) + [f">= {low}"] * (low is not None)
    bounds += [f"<= {high}"] * (high is not None)
    return " ".join([f"expected {kind}", " and ".join(bounds)]).rstrip() + (f"; {hint}" if hint else "")


def checked_integer(
    name: str, value: object, *, low: int | None = None, high: int | None = None, hint: str = ""
) -> int:
    """`value` as an int, or InputError with a line that begins with `name`."""
    expected = _expected("an integer", low, None, high, hint)
    if isinstance(value, bool):
        raise InputError(f"{name} is {value}, {expected}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"{name} is {_short(value)}, {expected}") from None
    if (low is not None and number < low) or (high is not None and number > high):
        raise InputError(f"{name} is {_short(number)}, {expected}")
    return number


def _number(
    name: str,
    value: object,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    hint: str = "",
) -> float:
    expected = _expected("a number", low, above, high, hint)
    if isinstance(value, (bool, str, bytes)):
        raise InputError(f"{name} is {_short(value)}, {expected}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name} is {_short(value)}, {expected}") from None
    outside = (
        (low is not None and number < low)
        or (above is not None and number <= above)
        or (high is not None and number > high)
    )
    if outside or not math.isfinite(number):
        raise InputError(f"{name} is {number}, {expected}")
    return number


def _stop_strings(value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Iterable) or isinstance(strings, (bytes, Mapping)):
        raise InputError(f"stop is {_short(value)}, expected a string or a list of strings")
    strings = tuple(strings)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise InputError(f"stop holds {_short(string)}, expected strings of at least one character")
    return strings


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise InputError(f"{name} is {_short(value)}, expected a list of token ids")
    return tuple(checked_integer(f"a value in {name}", item, low=0) for item in value)


def _logit_bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise InputError(f"logit_bias is {_short(value)}, expected a mapping of token ids to numbers")
    return {
        checked_integer("a token id in logit_bias", token, low=0): _number(
            "a value in logit_bias", bias, low=-100, high=100
        )
        for token, bias in value.items()
    }
