"""Chat templates: Jinja text that comes with a checkpoint, turns messages into a prompt, and is treated as hostile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateSyntaxError

from llmlab.errors import InputError
from llmlab.text.template_sandbox import MAX_CHARS, Refused, Sandbox, TooMuch

MAX_TEMPLATE_CHARS = 1 << 20


class ChatTemplate:
    """One compiled template. `source` is Jinja text; `special_tokens` are the variables bos_token, eos_token, …

    Raises InputError when the template is too long or isn't valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any] | None = None) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise InputError(f"chat template has {len(source):,} characters, the limit is {MAX_TEMPLATE_CHARS:,}")
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self._environment = Sandbox()
        try:
            self._template = self._environment.from_string(source)
        except TemplateSyntaxError as error:
            raise InputError(f"chat template is not valid Jinja, line {error.lineno}: {_one_line(error)}") from error
        except Exception as error:  # the compiler meets hostile text too: RecursionError, SyntaxError, ...
            raise InputError(f"chat template can't be compiled: {_one_line(error)}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None) -> str:
        """The prompt text of one conversation, up to where the answer begins; `variables` are more for the template.

        Raises InputError for malformed messages or a template that fails.
        """
        scope = {"tools": None, "documents": None, "add_generation_prompt": True, **self.special_tokens}
        scope |= {str(name): _plain(value) for name, value in (variables or {}).items()}
        scope["messages"] = check_messages(messages)
        parts: list[str] = []
        length = 0
        self._environment.budget.start()
        try:
            for part in self._template.generate(scope):
                length += len(part)
                if length > MAX_CHARS:
                    raise TooMuch(f"more than {MAX_CHARS:,} characters")
                parts.append(part)
        except Refused as error:
            raise InputError(f"the chat template refuses these messages: {_one_line(error)}") from error
        except TooMuch as error:
            raise InputError(f"the chat template wants too much: {_one_line(error)}") from error
        except Exception as error:  # whatever a template can provoke is the template's fault, not a bug of the caller's
            raise InputError(f"the chat template failed: {type(error).__name__}: {_one_line(error)}") from error
        return "".join(parts)


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation as plain JSON types (what a template sees has no methods of ours), or InputError."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise InputError(f"a conversation is a list of messages, not {type(messages).__name__}")
    if not messages:
        raise InputError("the conversation is empty: give at least one message {'role': 'user', 'content': '...'}")
    result = []
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(
                f"message {position} is {_short(message)}, expected a dict such as {{'role': 'user', 'content': '...'}}"
            )
        if not {"content", "tool_calls"} & set(message):
            raise InputError(f"message {position} (role {_short(message['role'])}) has no 'content'")
        # Many templates print None instead of skipping it.
        result.append({str(key): _plain(value) for key, value in message.items() if value is not None})
    return result


def _plain(value: Any, depth: int = 0) -> Any:
    if depth > 64:
        raise InputError("messages and template variables are nested more than 64 levels deep, or contain themselves")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    return f"<{type(value).__name__}>"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
