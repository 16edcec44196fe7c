"""A Jinja environment for templates of unknown origin, as Hugging Face's chat templates expect it.

It has what they use (`raise_exception`, `strftime_now`, `tojson`, loop controls, `{% generation %}`), inside Jinja's
immutable sandbox. The sandbox keeps a template from reaching Python; it doesn't keep it from eating the machine
(`range` is limited to 100,000, but loops nest and strings double). So here every loop step and call looks at a clock,
and every operation that can make a value longer asks a budget first.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Environment, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent, do_round
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_CHARS = 1 << 24
"""Longest rendered prompt, and longest string on the way there."""
MAX_ITEMS = 1 << 20
"""Most items of a list, counted with the items of its items."""
MAX_TOTAL = 1 << 28
"""Most characters and items that one rendering may make, all together."""
MAX_SECONDS = 10.0

_STR_METHODS = """
    capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit islower isnumeric
    isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition
    rsplit rstrip split splitlines startswith strip swapcase title upper
""".split()  # noqa: SIM905 (a list of 30 quoted words reads worse)
_FILTERS = """
    abs capitalize count d default dictsort e escape first float groupby indent int items join last length list lower
    map max min reject rejectattr replace reverse round safe select selectattr sort string title tojson
    trim truncate unique upper wordcount
""".split()  # noqa: SIM905 (a list of 30 quoted words reads worse)
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\*|\d{4,})")
_WIDE_FORMAT = re.compile(r"\{[^{}]*:[^{}]*(\{|\d{4,})")


class Refused(TemplateError):
    """The template called raise_exception."""


class TooMuch(SecurityError):
    """The template asked for more than the limits above."""


class _Budget(threading.local):
    """What one rendering may still use. Thread-local: one template may render in several threads at once."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.deadline = time.monotonic() + MAX_SECONDS
        self.left = MAX_TOTAL

    def tick(self) -> None:
        if time.monotonic() > self.deadline:
            raise TooMuch(f"it ran for more than {MAX_SECONDS:g} seconds")

    def spend(self, amount: int, limit: int = MAX_CHARS) -> None:
        self.tick()
        self.left -= amount
        if amount > limit or self.left < 0:
            raise TooMuch("a value grew beyond the size limit")

    def grown(self, value: Any) -> Any:
        """Charge for a value that was just made and hand it on."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.spend(_weight(value), MAX_ITEMS)
        return value


class _Guard(NodeTransformer):
    """Puts the budget into the template's syntax tree, where Jinja has no hook: loops, `~`, literals, block sets."""

    def _through(self, node: Any, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._through(node.iter, "_each")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._through(nodes.List(node.nodes, lineno=node.lineno), "join")

    def _literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else self._through(node, "_grown")

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = nodes.Filter(node.filter, "_grown", [], [], None, None, lineno=node.lineno)
        return node

    visit_List = visit_Dict = visit_Tuple = _literal


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what the model wrote, for training; here its body is just shown."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.budget = _Budget()
        self.finalize = pass_context(lambda context, value: self.budget.grown(value))  # every {{ … }}
        self.filters = {name: function for name, function in self.filters.items() if name in _FILTERS}
        self.filters |= _guarded_filters(self.budget)
        self.globals = {
            "range": safe_range,
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Guard().visit(tree)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _STR_METHODS
        if isinstance(obj, Mapping):
            return attr in ("get", "items", "keys", "values")
        if isinstance(obj, (list, tuple)):
            return attr in ("count", "index")
        if isinstance(obj, (int, float, bytes, range)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and _WIDE_FORMAT.search(value.__self__):
            raise TooMuch("a format string asks for a very wide field")
        return wrapped

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for value, factor in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(factor, int):
                    self.budget.spend(len(value) * max(factor, 0))
                elif isinstance(value, int) and abs(value) >= 2**64:
                    raise TooMuch("a number is too large")
        elif operator == "**" and not (abs(left) < 2**32 and abs(right) <= 64):
            raise TooMuch("a power is too large")
        elif operator == "%" and isinstance(left, str) and _WIDE_PERCENT.search(left):
            raise TooMuch("a format string asks for a very wide field")
        return self.budget.grown(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.budget.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            if __obj.__name__ == "replace" and len(args) >= 2:
                __self.budget.spend(_replaced_size(owner, str(args[0]), str(args[1])))
            elif __obj.__name__ == "join" and args:
                return _join(__self.budget, args[0], owner)
        return __self.budget.grown(super().call(__context, __obj, *args, **kwargs))


class _Namespace(Namespace):
    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace can't have the attribute {name!r}")
        super().__setitem__(name, value)


class _Each:
    """An iterable that looks at the clock at every step; it keeps its length, for `loop.last` and `loop.length`."""

    def __init__(self, budget: _Budget, items: Iterable[Any]) -> None:
        self._budget, self._items = budget, items

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._budget.tick()
            yield item

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]  # TypeError for a generator is what Jinja expects


def _guarded_filters(budget: _Budget) -> dict[str, Callable[..., Any]]:
    # A filter that takes the context is never evaluated at compile time, where no budget runs.
    @pass_context
    def each(context: Context, items: Iterable[Any]) -> _Each:
        return _Each(budget, items)

    @pass_context
    def grown(context: Context, value: Any) -> Any:
        return budget.grown(value)

    @pass_context
    def join(context: Context, items: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            environment: Environment = context.environment
            items = (environment.getitem(item, attribute) for item in items)
        return _join(budget, items, str(d))

    @pass_context
    def replace(context: Context, value: Any, old: Any, new: Any, count: int = -1) -> str:
        budget.spend(_replaced_size(str(value), str(old), str(new)))
        return str(value).replace(str(old), str(new), -1 if count is None else count)

    @pass_context
    def indent(context: Context, value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        pad = width if isinstance(width, int) else len(width)
        budget.spend(len(value) + pad * (value.count("\n") + 1))
        return do_indent(value, width, first, blank)

    @pass_context
    def rounded(context: Context, value: float, precision: int = 0, method: Any = "common") -> float:
        if abs(precision) > 20:
            raise TooMuch("the precision is too large")
        return do_round(value, precision, method)

    @pass_context
    def tojson(
        context: Context,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if (indent if isinstance(indent, int) else len(indent or "")) > 16:
            raise TooMuch("the indentation is too large")
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return budget.grown(text)

    @pass_context
    def string(context: Context, value: Any) -> str:
        return budget.grown(str(value))

    return {
        "_each": each,
        "_grown": grown,
        "join": join,
        "replace": replace,
        "indent": indent,
        "round": rounded,
        "tojson": tojson,
        "string": string,
    }


def _join(budget: _Budget, items: Iterable[Any], separator: str) -> str:
    parts = []
    for item in items:
        parts.append(str(item))
        budget.spend(len(parts[-1]) + len(separator))
    return budget.grown(separator.join(parts))


def _replaced_size(text: str, old: str, new: str) -> int:
    return len(text) + text.count(old) * len(new)


def _weight(value: Any) -> int:
    """Items of a container with the items of its items, as a tree. Stops counting above the limit."""
    count, stack = 0, [value]
    while stack and count <= MAX_ITEMS:
        item = stack.pop()
        count += 1
        if isinstance(item, (list, tuple)):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
    return count


def _raise_exception(message: Any = "") -> None:
    raise Refused(str(message))
