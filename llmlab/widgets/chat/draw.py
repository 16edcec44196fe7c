"""How a conversation looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from llmlab.runtime.params import SamplingParams
from llmlab.widgets.chat.model import Answer, Token, Turn, percent
from llmlab.widgets.markup import Attribute, button, checkbox, control, h

FIELDS: dict[str, tuple[str, str, dict[str, Attribute]]] = {
    "temperature": ("Temperature", "0 always takes the most likely token", {"min": 0, "max": 100, "step": "any"}),
    "top_p": (
        "Top-p",
        "keep the most likely tokens that hold this much probability",
        {"min": 0, "max": 1, "step": "any"},
    ),
    "top_k": ("Top-k", "keep this many most likely tokens; 0 keeps all", {"min": 0, "step": 1}),
    "max_tokens": ("Max tokens", "longest answer", {"min": 1, "step": 1}),
    "seed": ("Seed", "same seed, same answer; empty draws a new one each time", {}),
}
MOST_SPELLED = 1500
"""Most tokens that are drawn one by one; older answers are plain text."""


def settings(params: SamplingParams, system: str, together: bool | None) -> Markup:
    """The sampling controls, and one line of what they say. together: None with one engine."""
    fields: list[Markup] = []
    for key, (label, title, limits) in FIELDS.items():
        value = getattr(params, key)
        kind: dict[str, Attribute] = (
            {"type": "number", **limits} if limits else {"type": "text", "inputmode": "numeric"}
        )
        box = h("input", **kind, value=_plain(value), class_="short", **control("set", key))
        fields.append(h("label", f"{label} ", box, title=title))
    prompt = h("input", type="text", value=system, placeholder="none", **control("system"))
    fields.append(h("label", "System prompt ", prompt, class_="system"))
    if together is not None:
        fields.append(checkbox("answer at the same time (untick to time each by itself)", "together", together))
    said = ", ".join(
        f"{FIELDS[k][0].lower()} {_plain(getattr(params, k))}" for k in FIELDS if getattr(params, k) is not None
    )
    line = h(
        "p", f"Sampling: {said}.", f" System prompt: “{system}”." if system.strip() else "", class_="soft static-only"
    )
    return h("div", line, h("div", fields, class_="bar live-only"))


def compose(busy: bool, some: bool) -> Markup:
    """Where the next message is typed, and Stop while an answer grows."""
    text = h(
        "textarea",
        name="text",
        rows=2,
        aria_label="Your message",
        placeholder="Ask something. Enter sends, Shift+Enter makes a new line.",
        data_draft="message",
        data_clears=True,
        data_enter=not busy,
    )
    send = h("button", "Send", type="submit", class_="main", disabled=busy)
    stop = button("Stop", "stop", disabled=not busy, title="End the answer before its next token")
    clear = button("New conversation", "clear", disabled=busy or not some)
    form = control("send") if not busy else {}
    return h("form", text, h("div", send, stop, clear, class_="bar"), class_="live-only", **form)


def spelled(turns: Sequence[Turn]) -> int:
    """Index of the first turn whose tokens are drawn one by one."""
    left, first = MOST_SPELLED, len(turns)
    for turn in reversed(turns):
        left -= sum(len(answer.tokens) for answer in turn.answers)
        if left < 0:
            break
        first -= 1
    return min(first, max(len(turns) - 1, 0))


def turns(shown: Sequence[Turn], first: int, editing: int | None, busy: bool, spelled_from: int) -> Markup:
    """Turns, the first of which has the index `first`."""
    if not shown and not first:
        return Markup("")
    return h(
        "div",
        [_turn(turn, place, place == editing, busy, place >= spelled_from) for place, turn in enumerate(shown, first)],
    )


def detail(all_turns: Sequence[Turn], turn: int | None, token: int | None) -> Markup:
    """How likely the engines found what could have come in one place."""
    if turn is None or token is None or turn >= len(all_turns):
        return Markup("")
    tables = [_choices(a, token) for a in all_turns[turn].answers if token < len(a.tokens)]
    if not tables:
        return Markup("")
    where = f" of answer {turn + 1}" if len(all_turns) > 1 else ""
    return h("div", h("h4", f"Token {token + 1}{where}: what could have come"), h("div", tables, class_="columns"))


def as_text(title: str, all_turns: Sequence[Turn]) -> str:
    """The conversation as plain text."""
    lines = [title]
    for turn in all_turns:
        lines.append(f"\nYou: {turn.user}")
        for answer in turn.answers:
            lines.append(f"{answer.engine}: {answer.error or answer.text}")
        lines += [f"({turn.comparison()})"] if turn.comparison() else []
    return "\n".join(lines)


def facts(answer: Answer) -> str:
    """How an answer ended and how long it took."""
    how = {"cancelled": "stopped", "length": "cut at its longest", "stop": "finished"}.get(
        answer.finish_reason or "", ""
    )
    metrics = answer.metrics
    if metrics is None or not metrics.output_tokens:
        return how or ("" if answer.error else "…")
    speed = f"{metrics.tokens_per_s:.0f} tokens/s" if metrics.output_tokens > 1 else ""
    count = f"{metrics.output_tokens} tokens" if metrics.output_tokens > 1 else "1 token"
    parts = [how, count, f"first after {1e3 * metrics.ttft_s:.0f} ms", speed]
    return ", ".join(part for part in parts if part)


def _plain(value: float | None) -> str:
    return "" if value is None else str(int(value)) if value == int(value) else str(value)


def _turn(turn: Turn, place: int, editing: bool, busy: bool, spell: bool) -> Markup:
    if editing:
        text = h(
            "textarea", turn.user, name="text", rows=2, aria_label="Your message", data_draft="edit", data_enter=True
        )
        again = h("button", "Ask this instead", type="submit", class_="main")
        bar = h("div", again, button("Leave as it was", "shut"), class_="bar")
        said = h("form", text, bar, class_="live-only", **control("edit", str(place)))
    else:
        edit = button(
            "Edit", "open", str(place), disabled=busy, title="Ask something else here and forget what follows"
        )
        said = h("div", h("b", "You"), " ", h("span", turn.user, class_="text"), " ", edit, class_="said")
    pair = len(turn.answers) > 1
    difference = turn.first_difference
    answers = [_answer(turn, place, which, difference, pair, spell) for which in range(len(turn.answers))]
    verdict = h("p", h("b", turn.comparison()), class_="verdict") if turn.comparison() else None
    again = button("Answer again", "regenerate", str(place), disabled=busy, title="Forget this answer and what follows")
    return h("article", said, h("div", answers, class_="columns" if pair else None), verdict, again)


def _answer(turn: Turn, place: int, which: int, difference: int | None, pair: bool, spell: bool) -> Markup:
    answer = turn.answers[which]
    if spell:
        body = h("div", _spans(answer, place, difference), class_="text", data_walk="row")
    else:
        body = h("div", answer.text, class_="text")
    problem = h("div", answer.error, role="alert") if answer.error else None
    keep = None
    if pair:
        kept = turn.kept == which
        keep = button(
            "going on with this one" if kept else "Go on with this one",
            "keep",
            f"{place}.{which}",
            aria_pressed="true" if kept else "false",
        )
    small = h("small", facts(answer), class_="facts", aria_live="polite" if answer.going else None)
    return h("div", h("b", answer.engine), body, problem, h("div", small, keep, class_="bar"), class_="answer")


def _spans(answer: Answer, place: int, difference: int | None) -> Iterator[Markup]:
    """A span for each run of tokens that ends with text; tokens without text belong to the character that follows."""
    start = 0
    for index, token in enumerate(answer.tokens):
        last = index == len(answer.tokens) - 1
        if not token.text and not last:
            continue
        run = answer.tokens[start : index + 1]
        here = difference is not None and start <= difference <= index
        after = difference is not None and start > difference
        unsure = any(t.probability is not None and t.probability < 0.5 for t in run)
        names = ["tok", "differs" if here else "", "after" if after else "", "unsure" if unsure else ""]
        yield h(
            "span",
            h("sup", "≠", aria_label="first different token") if here else None,
            token.text or (h("i", token.label, class_="soft") if not answer.going else ""),
            class_=" ".join(n for n in names if n),
            title="\n".join(_explained(t, start + i) for i, t in enumerate(run)),
            tabindex=0 if start == 0 else -1,
            role="button",
            **control("token", f"{place}.{index if not here else difference}"),
        )
        start = index + 1


def _explained(token: Token, index: int) -> str:
    said = f"token {index + 1}: {token.label}"
    if token.probability is None:
        return said
    others = ", ".join(f"{c.label} {percent(c.probability)}" for c in token.top if c.label != token.label)
    return f"{said} {percent(token.probability)}" + (f"; others: {others}" if others else "")


def _choices(answer: Answer, place: int) -> Markup:
    token = answer.tokens[place]
    rows = [(c.label, c.probability, c.label == token.label) for c in token.top]
    if token.probability is not None and not any(taken for *_, taken in rows):
        rows.append((token.label, token.probability, True))
    body = [
        h(
            "tr",
            h("td", h("code", label), " ", h("span", "taken", class_="badge") if taken else None),
            h("td", percent(probability), class_="number"),
            h("td", h("span", class_="measure", style=f"width:{max(1, round(120 * probability))}px")),
        )
        for label, probability, taken in rows
    ]
    head = h("tr", h("th", "token"), h("th", "probability", class_="number"), h("th", ""))
    return h("div", h("b", answer.engine), h("table", head, body))
