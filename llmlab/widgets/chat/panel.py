"""`llmlab.chat`: talk to one engine, or to two at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from llmlab.errors import InputError
from llmlab.runtime.llm import LLM
from llmlab.runtime.params import SamplingParams
from llmlab.widgets.chat import draw
from llmlab.widgets.chat.conversation import Conversation
from llmlab.widgets.chat.speaker import Speaker
from llmlab.widgets.panel import Panel

if TYPE_CHECKING:
    from llmlab.runtime.llm import LoadedEngine
    from llmlab.widgets.chat.model import Turn


def chat(
    engine: LLM | LoadedEngine | str | Path,
    other: LLM | LoadedEngine | str | Path | None = None,
    *,
    params: SamplingParams | None = None,
    system: str = "",
    names: Sequence[str] | None = None,
    threads: int | None = None,
) -> Chat:
    """A chat panel over one engine, or over two that answer the same prompts side by side.

    engine, other: an Engine, the path of one, or an LLM. What is opened here is closed by `close()`
    params: what the controls begin with; temperature is 0 where it is None. Log probabilities are always asked for
    system: the system prompt
    names: what the engines are called; else their folders' names
    threads: CPU threads of each engine that is opened here

    Raises InputError for an engine that can't chat, EngineError for one that can't be opened.
    """
    return Chat(engine, other, params=params, system=system, names=names, threads=threads)


class Chat(Panel):
    """The panel; `ask` and the others do from Python what its controls do. Answers are generated on threads of their own."""

    name = "chat"
    regions = ("settings", "log", "last", "compose", "detail")

    def __init__(
        self,
        engine: LLM | LoadedEngine | str | Path,
        other: LLM | LoadedEngine | str | Path | None = None,
        *,
        params: SamplingParams | None = None,
        system: str = "",
        names: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        engines = [engine] if other is None else [engine, other]
        called = _names(engines, names)
        self.params = _shown(params or SamplingParams())
        self._talk = Conversation(self.lock, on_growth=lambda: self.refresh("last"), on_end=self._on_end)
        self._talk.system = system
        self.editing: int | None = None
        self.chosen: tuple[int, int] | None = None
        """(turn, token) that the details are about."""
        try:
            for each, label in zip(engines, called, strict=True):
                self.speakers.append(Speaker(each, label, threads=threads))
        except BaseException:
            self.close()
            raise

    # What the page shows.

    def title(self) -> str:
        return "Chat with " + " and ".join(speaker.name for speaker in self.speakers)

    def draw_settings(self) -> Markup:
        return draw.settings(self.params, self._talk.system, self._talk.together if len(self.speakers) > 1 else None)

    def draw_log(self) -> Markup:
        return draw.turns(self.turns[:-1], 0, self.editing, self.busy, draw.spelled(self.turns))

    def draw_last(self) -> Markup:
        first = max(len(self.turns) - 1, 0)
        return draw.turns(self.turns[-1:], first, self.editing, self.busy, draw.spelled(self.turns))

    def draw_compose(self) -> Markup:
        return draw.compose(self.busy, bool(self.turns))

    def draw_detail(self) -> Markup:
        return draw.detail(self.turns, *self._looked_at())

    def to_dict(self) -> dict[str, Any]:
        """The conversation as plain data, with all tokens and their probabilities."""
        with self.lock:
            return {
                "panel": self.name,
                "title": self.title(),
                "engines": [speaker.name for speaker in self.speakers],
                "system": self._talk.system,
                "params": self.params.to_dict(),
                "turns": [turn.to_dict() for turn in self.turns],
            }

    def __str__(self) -> str:
        with self.lock:
            return draw.as_text(self.title(), self.turns)

    # What can be done from Python.

    @property
    def speakers(self) -> list[Speaker]:
        """The engines."""
        return self._talk.speakers

    @property
    def turns(self) -> list[Turn]:
        """What was asked and answered."""
        return self._talk.turns

    @property
    def busy(self) -> bool:
        """Whether an answer is being generated."""
        return self._talk.busy

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far as messages, with the answers that it goes on with."""
        with self.lock:
            return self._talk.messages()

    def send(self, text: str) -> None:
        """Ask something; returns at once. Raises InputError while an answer is being generated."""
        with self.lock:
            self._ask(text)
        self.refresh()

    def ask(self, text: str, timeout: float | None = None) -> Turn:
        """Ask something and wait for the answers."""
        self.send(text)
        self.wait(timeout)
        return self.turns[-1]

    def edit(self, turn: int, text: str) -> None:
        """Ask something else in the place of an earlier message; what came after it is forgotten. Returns at once."""
        with self.lock:
            self._again(turn, text)
        self.refresh()

    def regenerate(self, turn: int = -1) -> None:
        """Answer a message again; what came after it is forgotten. Returns at once."""
        with self.lock:
            place = turn + len(self.turns) if turn < 0 else turn
            self._again(place, None)
        self.refresh()

    def keep(self, turn: int, which: int) -> None:
        """Go on with the answer of engine `which` in that turn."""
        with self.lock:
            self._talk.keep(turn, which)
        self.refresh("log", "last")

    def stop(self) -> None:
        """End the answers under way before their next token; returns at once."""
        self._talk.stop()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no answer is being generated; whether that is so. Ctrl-C stops the answers."""
        return self._talk.wait(timeout)

    def clear(self) -> None:
        """Forget the conversation. Raises InputError while an answer is being generated."""
        with self.lock:
            self.on_clear("", None)
        self.refresh()

    def close(self) -> None:
        """Stop, and free the engines that were opened here."""
        self._talk.close()

    # What the page's controls do.

    def on_send(self, key: str, value: Any) -> None:
        self._ask(_text_of(value))

    def on_stop(self, key: str, value: Any) -> list[str]:
        self.stop()
        return []

    def on_regenerate(self, key: str, value: Any) -> None:
        self._again(_integer(key), None)

    def on_open(self, key: str, value: Any) -> list[str]:
        self._talk.check_free()
        self.editing = self._talk.place(_integer(key))
        return ["log", "last"]

    def on_shut(self, key: str, value: Any) -> list[str]:
        self.editing = None
        return ["log", "last"]

    def on_edit(self, key: str, value: Any) -> None:
        self._again(_integer(key), _text_of(value))

    def on_keep(self, key: str, value: Any) -> list[str]:
        turn, _, which = key.partition(".")
        self._talk.keep(_integer(turn), _integer(which))
        return ["log", "last"]

    def on_clear(self, key: str, value: Any) -> None:
        self._talk.clear()
        self.editing = self.chosen = None

    def on_token(self, key: str, value: Any) -> list[str]:
        turn, _, token = key.partition(".")
        self.chosen = self._talk.place(_integer(turn)), _integer(token)
        return ["detail"]

    def on_system(self, key: str, value: Any) -> list[str]:
        self._talk.system = str(value)
        return []

    def on_together(self, key: str, value: Any) -> list[str]:
        self._talk.together = bool(value)
        return []

    def on_set(self, key: str, value: Any) -> list[str]:
        if key not in draw.FIELDS:
            return []
        if key == "seed":
            value = None if str(value).strip() == "" else _integer(str(value), "seed")
        elif isinstance(value, float) and value.is_integer() and key in ("top_k", "max_tokens"):
            value = int(value)
        self.params = dataclasses.replace(self.params, **{key: value})
        return []

    def _ask(self, text: str) -> None:
        self._talk.ask(text, self.params)
        self.editing = self.chosen = None

    def _again(self, turn: int, text: str | None) -> None:
        place = self._talk.place(turn)
        self._talk.ask(self.turns[place].user if text is None else text, self.params, place)
        self.editing = self.chosen = None

    def _on_end(self, whole: bool) -> None:
        self.refresh(*(("log", "last", "compose", "detail") if whole else ("last",)))

    def _looked_at(self) -> tuple[int, int] | tuple[None, None]:
        """(turn, token) to show details of: the chosen one, else where the last answers part."""
        if self.chosen is not None:
            return self.chosen
        place = self.turns[-1].first_difference if self.turns else None
        return (None, None) if place is None else (len(self.turns) - 1, place)


def _names(engines: Sequence[Any], names: Sequence[str] | None) -> list[str]:
    if names is not None:
        if len(names) != len(engines) or isinstance(names, str):
            raise InputError(f"names are {names!r}, expected one for each of the {len(engines)} engines")
        return [str(name) for name in names]
    found = []
    for place, engine in enumerate(engines):
        path = engine if isinstance(engine, (str, Path)) else getattr(engine, "path", None)
        found.append(f"engine {'AB'[place]}" if path is None else Path(path).name)
    return [f"{n} ({'AB'[i]})" for i, n in enumerate(found)] if len(set(found)) < len(found) else found


def _shown(params: SamplingParams) -> SamplingParams:
    """With values in all fields that have a control."""
    return dataclasses.replace(params.resolve({}), n=1)


def _text_of(value: Any) -> str:
    return str(value.get("text", "")) if isinstance(value, dict) else str(value or "")


def _integer(text: str, name: str = "the number") -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{name} is {text!r}, expected an integer") from None
