"""Results as data, text, rich and HTML."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from llmlab.runtime.outputs import Completion, RequestMetrics, Result
from llmlab.runtime.sampler import TokenLogprobs

METRICS = RequestMetrics(
    prompt_tokens=3, output_tokens=6, queue_s=0.5, ttft_s=1.0, e2e_s=3.0, itl_s=[0.1] * 18 + [0.2, 5.0]
)


def result(text: str = "answer", prompt: str | None = "question", count: int = 1) -> Result:
    completions = [Completion(i, text, [4, 5], "stop", [TokenLogprobs(4, -0.5, ((4, -0.5),))]) for i in range(count)]
    return Result(prompt, [1, 2, 3], completions, METRICS)


def test_metrics() -> None:
    assert METRICS.itl_mean_s == pytest.approx((1.8 + 5.2) / 20)
    assert METRICS.itl_p95_s == 0.2
    assert METRICS.tokens_per_s == 2.0
    assert str(METRICS) == "3 tokens in, 6 out, first after 1000 ms, 350.0 ms a token, 2.0 tokens/s"
    one = RequestMetrics(prompt_tokens=1, output_tokens=1, queue_s=0, ttft_s=1, e2e_s=0)
    assert one.itl_mean_s is None and one.itl_p95_s is None and one.tokens_per_s == 0
    assert "a token" not in str(one)


def test_shortcuts_are_those_of_the_first_completion() -> None:
    one = result(count=2)
    first = one.completions[0]
    assert (one.text, one.token_ids, one.finish_reason, one.logprobs) == ("answer", [4, 5], "stop", first.logprobs)


def test_to_dict_is_json_and_complete() -> None:
    data = json.loads(json.dumps(result(count=2).to_dict()))
    assert data["prompt"] == "question" and data["prompt_token_ids"] == [1, 2, 3]
    assert [c["index"] for c in data["completions"]] == [0, 1]
    assert data["completions"][0]["logprobs"] == [{"token_id": 4, "logprob": -0.5, "top": [[4, -0.5]]}]
    assert data["metrics"]["itl_p95_s"] == 0.2 and data["metrics"]["queue_s"] == 0.5


def test_html_is_escaped() -> None:
    hostile = "<script>alert('x')</script>&"
    html = result(hostile, hostile)._repr_mimebundle_()["text/html"]
    assert "<script" not in html and html.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&amp;") == 2
    assert html.count("<div") == html.count("</div>")


def test_plain_and_rich_show_text_as_it_is() -> None:
    marked = result("[bold]not markup[/bold] :smile:", "[red]prompt", count=2)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(marked)
    shown = console.export_text()
    for text in (shown, marked._repr_mimebundle_()["text/plain"]):
        assert "[bold]not markup[/bold] :smile:" in text and "[red]prompt" in text and "2.0 tokens/s" in text
    assert "2 of 2, 2 tokens, stop" in shown


def test_a_result_without_text_shows_its_ids() -> None:
    assert "[4, 5]" in str(result("", None)) and "3 token ids" in str(result("", None))
