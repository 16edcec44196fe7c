"""Elements of HTML and SVG as text in which everything that isn't markup already is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from markupsafe import Markup, escape

Child: TypeAlias = "str | int | float | Iterable[Child] | None"
Attribute: TypeAlias = "str | int | float | bool | None"

_VOID = frozenset({"input", "br", "hr", "img"})
_CONTROL = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)), "�")


def h(tag: str, /, *children: Child, **attributes: Attribute) -> Markup:
    """`<tag …>children</tag>`.

    children: text, which is escaped; Markup, which is not; numbers; lists of these; None is left out
    attributes: True stands alone, None and False are left out; `class_` is class, other `_` are `-` (`data_key`)
    """
    given = Markup("").join(_attribute(key, value) for key, value in attributes.items())
    if tag in _VOID:
        return Markup(f"<{tag}{given}>")
    return Markup(f"<{tag}{given}>{_join(children)}</{tag}>")


def button(label: Child, act: str, key: str = "", *, title: str = "", **attributes: Attribute) -> Markup:
    """A button that sends `act` with `key` to its panel; it is not there in a static picture."""
    return h("button", label, type="button", title=title or None, **control(act, key, **attributes))


def select(label: str, act: str, options: Iterable[tuple[str, str]], chosen: str) -> Markup:
    """A labelled choice among (value, text); sends `act` with the value."""
    shown = [h("option", text, value=value, selected=value == chosen) for value, text in options]
    return h("label", f"{label} ", h("select", shown, **control(act)), class_="live-only")


def slider(label: str, act: str, low: float, high: float, value: float, *, step: float = 1, text: str = "") -> Markup:
    """A labelled slider; sends `act` with the number while it moves. text: what stands behind it, else the number."""
    bar = h(
        "input", type="range", min=low, max=high, step=step, value=value, aria_valuetext=text or None, **control(act)
    )
    return h("label", f"{label} ", bar, " ", h("output", text or f"{value:g}"), class_="live-only")


def checkbox(label: str, act: str, on: bool) -> Markup:
    """A labelled tick; sends `act` with true or false."""
    return h("label", h("input", type="checkbox", checked=on, **control(act)), f" {label}", class_="live-only")


def copies(label: str, text: str, title: str = "") -> Markup:
    """A button that puts `text` on the clipboard, in the page alone."""
    return h("button", label, type="button", class_="live-only", title=title or None, data_copy=text)


def control(act: str, key: str = "", **attributes: Attribute) -> dict[str, Attribute]:
    """The attributes that make any element send `act` with `key`: on a click; on a change if it has a value."""
    return {"data_act": act, "data_key": key or None, **attributes}


def _attribute(key: str, value: Attribute) -> Markup:
    if value is None or value is False:
        return Markup("")
    name = "class" if key == "class_" else key.replace("_", "-")
    if value is True:
        return Markup(f" {name}")
    return Markup(f' {name}="{escape(_text(value))}"')


def _join(children: Iterable[Child]) -> Markup:
    parts: list[Markup] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, (str, int, float)):
            parts.append(escape(_text(child)))
        else:
            parts.append(_join(child))
    return Markup("").join(parts)


def _text(value: str | int | float) -> str:
    return str(value).translate(_CONTROL)
