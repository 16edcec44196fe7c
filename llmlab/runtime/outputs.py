"""What comes back from a request: results, their pieces while they stream, and how long it all took."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from llmlab.runtime.request import FinishReason

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmlab.runtime.sampler import TokenLogprobs


@dataclass(frozen=True)
class Delta:
    """A piece of a streamed answer. The texts of all pieces of one index, joined, are that completion's text."""

    index: int
    """Which of the request's n completions this belongs to."""
    text: str
    """Never ends in half a character; may be empty while a character or a stop string is undecided."""
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    """One entry a token, if SamplingParams.logprobs asked for them."""
    finish_reason: FinishReason | None = None
    """Set on the last piece of a completion."""


@dataclass(frozen=True)
class Completion:
    """One answer to a prompt."""

    index: int
    text: str
    """Without special tokens, stop strings and stop tokens."""
    token_ids: list[int]
    """All that was generated, with the token that ended it."""
    finish_reason: FinishReason | None
    """"stop": end-of-sequence, a stop token or a stop string; "length": max_tokens or the engine's limit."""
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class RequestMetrics:
    """Times of one request, in seconds, and token counts. Token times are those at which tokens left the engine."""

    prompt_tokens: int
    output_tokens: int
    """Of all completions together."""
    queue_s: float
    """From arrival to the beginning of the first step that worked on the request."""
    ttft_s: float
    """Time to first token, from arrival."""
    e2e_s: float
    """From arrival to the last token of the last completion."""
    itl_s: list[float] = field(default_factory=list, repr=False)
    """Inter-token latencies of completion 0: output tokens minus one values."""

    @property
    def itl_mean_s(self) -> float | None:
        """Mean inter-token latency; None with fewer than two tokens."""
        return sum(self.itl_s) / len(self.itl_s) if self.itl_s else None

    @property
    def itl_p95_s(self) -> float | None:
        """The latency that 95 % of the inter-token latencies don't exceed (nearest rank)."""
        return sorted(self.itl_s)[math.ceil(0.95 * len(self.itl_s)) - 1] if self.itl_s else None

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all completions per second of e2e_s."""
        return self.output_tokens / self.e2e_s if self.e2e_s > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        derived = {name: getattr(self, name) for name in ("itl_mean_s", "itl_p95_s", "tokens_per_s")}
        return asdict(self) | derived

    def __str__(self) -> str:
        itl = "" if self.itl_mean_s is None else f", {self.itl_mean_s * 1e3:.1f} ms a token"
        return (
            f"{self.prompt_tokens} tokens in, {self.output_tokens} out, first after {self.ttft_s * 1e3:.0f} ms{itl}, "
            f"{self.tokens_per_s:.1f} tokens/s"
        )


@dataclass(frozen=True)
class Result:
    """A request's prompt, its completions and its metrics. `.text` and so on are those of the first completion."""

    prompt: str | None
    """The text that was tokenized (a chat's is what the template wrote); None if the prompt was given as ids."""
    prompt_token_ids: list[int]
    completions: list[Completion]
    metrics: RequestMetrics

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.completions[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.completions[0].logprobs

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "prompt": self.prompt,
            "prompt_token_ids": self.prompt_token_ids,
            "completions": [asdict(completion) for completion in self.completions],
            "metrics": self.metrics.to_dict(),
        }

    def _shown_prompt(self) -> str:
        return f"{len(self.prompt_token_ids)} token ids" if self.prompt is None else self.prompt

    def __str__(self) -> str:
        answers = [f"[{c.finish_reason}] {c.text or c.token_ids}" for c in self.completions]
        return "\n".join([f"> {self._shown_prompt()}", *answers, str(self.metrics)])

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        answers = [
            Panel(Text(c.text or str(c.token_ids)), title=_title(c, self.completions), title_align="left")
            for c in self.completions
        ]
        return Group(Text(self._shown_prompt(), style="bold"), *answers, Text(str(self.metrics), style="dim"))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        answers = "".join(
            f"<div style='border-left:3px solid #8884;padding:.2em .8em;margin:.4em 0;white-space:pre-wrap'>"
            f"{html.escape(c.text or str(c.token_ids))}"
            f"<div style='opacity:.6;font-size:85%'>{html.escape(_title(c, self.completions))}</div></div>"
            for c in self.completions
        )
        return {
            "text/plain": str(self),
            "text/html": (
                f"<div><div style='font-weight:600;white-space:pre-wrap'>{html.escape(self._shown_prompt())}</div>"
                f"{answers}<div style='opacity:.6;font-size:85%'>{html.escape(str(self.metrics))}</div></div>"
            ),
        }


def _title(completion: Completion, siblings: Sequence[Completion]) -> str:
    number = f"{completion.index + 1} of {len(siblings)}, " if len(siblings) > 1 else ""
    return f"{number}{len(completion.token_ids)} tokens, {completion.finish_reason}"
