"""The passes that `optimize` runs: those that llmlab brings, and those that users register, in one order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import overload

from llmlab.errors import InputError, nearest
from llmlab.graph.rewrite import Pass

Names = str | Sequence[str]


@dataclass(frozen=True)
class _Registered:
    make: type[Pass]
    before: tuple[str, ...]
    after: tuple[str, ...]


class Pipeline:
    """`own` passes keep their order. A registered pass stands before the first run and after the last run of what it names."""

    def __init__(self, own: Sequence[Callable[[], Pass]]) -> None:
        self._own = tuple(own)
        self._names = tuple(make().name for make in own)
        self._registered: dict[str, _Registered] = {}

    @property
    def registered(self) -> frozenset[str]:
        """Names of the passes that were registered."""
        return frozenset(self._registered)

    @overload
    def register_pass(self, pass_class: type[Pass], /) -> type[Pass]: ...
    @overload
    def register_pass(
        self, /, *, before: Names = ..., after: Names = ..., replace: bool = ...
    ) -> Callable[[type[Pass]], type[Pass]]: ...
    def register_pass(
        self, pass_class: type[Pass] | None = None, /, *, before: Names = (), after: Names = (), replace: bool = False
    ) -> type[Pass] | Callable[[type[Pass]], type[Pass]]:
        """Class decorator: `optimize` runs this `Pass` from now on, in this process.

            @ll.register_pass(after="fuse_rms_norm", before=("pack_tokens", "merge_products"))
            class Mine(ll.Pass): ...

        before, after: names of passes, llmlab's or registered ones. Some of llmlab's run several times: *before* is
            before the first of these runs, *after* is after the last. Near what it names; without any, at the end.
        replace: take the place of a registered pass of the same name (a cell that is run again).
        Raises InputError for an unknown name, an order that can't be, or a name that is taken; nothing changes then.
        """
        if pass_class is not None:
            self._add(pass_class, _names(before), _names(after), replace)
            return pass_class

        def decorate(pass_class: type[Pass]) -> type[Pass]:
            self._add(pass_class, _names(before), _names(after), replace)
            return pass_class

        return decorate

    def unregister_pass(self, name: str) -> None:
        """Take a registered pass out again. Raises InputError if there is none, or others are ordered by it."""
        if name not in self._registered:
            known = f"llmlab's own {name} stays" if name in self._names else nearest(name, self._registered)
            raise InputError(f"no registered pass is called {name!r} ({known})")
        if ordered := [n for n, r in self._registered.items() if name in r.before + r.after and n != name]:
            raise InputError(f"{', '.join(ordered)} is ordered before or after {name!r}: unregister it first")
        del self._registered[name]

    @contextmanager
    def registered_pass(self, pass_class: type[Pass], *, before: Names = (), after: Names = ()) -> Iterator[None]:
        """`register_pass` for the length of a `with` block."""
        self.register_pass(before=before, after=after)(pass_class)
        try:
            yield
        finally:
            self.unregister_pass(pass_class.name)

    def passes(self, without: Names = ()) -> list[Callable[[], Pass]]:
        """What to run, in order, but for those that are named. Raises InputError for an unknown name."""
        left_out, known = _names(without), {*self._names, *self._registered}
        for name in left_out:
            if name not in known:
                raise InputError(f"no pass is called {name!r} ({nearest(name, known)})")
        everything = _arranged(self._own, self._names, self._registered)
        return [make for make in everything if make().name not in left_out] if left_out else everything

    def _add(self, pass_class: type[Pass], before: tuple[str, ...], after: tuple[str, ...], replace: bool) -> None:
        if not (isinstance(pass_class, type) and issubclass(pass_class, Pass)):
            raise InputError(f"register_pass got {pass_class!r}, expected a class that derives from llmlab.Pass")
        name = getattr(pass_class, "name", None)
        if not isinstance(name, str) or not re.fullmatch(r"[\w.:-]+", name):
            raise InputError(f"{pass_class.__name__}.name is {name!r}, expected a name such as 'fuse_square'")
        if name in self._names:
            raise InputError(f"llmlab has a pass called {name!r} of its own: choose another name")
        if name in self._registered and not replace:
            raise InputError(
                f"a pass called {name!r} is registered: register with replace=True to put this in its place"
            )
        known = [*self._names, *(n for n in self._registered if n != name)]
        for wanted in before + after:
            if wanted not in known:
                raise InputError(
                    f"{name!r} is ordered by {wanted!r}, which is no other pass ({nearest(wanted, known)})"
                )
        changed = self._registered | {name: _Registered(pass_class, before, after)}
        _arranged(self._own, self._names, changed)
        self._registered = changed


def _names(given: Names) -> tuple[str, ...]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise InputError(f"expected the name of a pass or a list of them, got {given!r}")
    return tuple(names)


def _arranged(
    own: Sequence[Callable[[], Pass]], names: Sequence[str], registered: dict[str, _Registered]
) -> list[Callable[[], Pass]]:
    """Every registered pass in a gap between two of `own`: gap g is the one before own[g]."""
    earlier = {n: [*(a for a in r.after if a in registered)] for n, r in registered.items()}
    for name, entry in registered.items():
        for later in entry.before:
            if later in registered:
                earlier[later].append(name)
    order = _sorted(earlier)
    # The last gap that a pass may stand in, and what says so: its own `before`, or that of a pass that comes after it.
    latest = {
        n: min([(names.index(b), b) for b in r.before if b in names], default=(len(own), ""))
        for n, r in registered.items()
    }
    for name in reversed(order):
        for before in earlier[name]:
            latest[before] = min(latest[before], latest[name])
    gaps: dict[str, tuple[int, str]] = {}
    for name in order:
        bounds = [(len(names) - names[::-1].index(a), a) for a in registered[name].after if a in names]
        bounds += [gaps[n] for n in earlier[name]]
        gaps[name] = gap, after = max(bounds, default=latest[name])
        if gap > latest[name][0]:
            raise InputError(
                f"{name!r} can't run both after {after!r} and before {latest[name][1]!r}: the order is {', '.join(dict.fromkeys(names))}"
            )
    result: list[Callable[[], Pass]] = []
    for at in range(len(own) + 1):
        result += [registered[name].make for name in order if gaps[name][0] == at]
        result += own[at : at + 1]
    return result


def _sorted(earlier: dict[str, list[str]]) -> list[str]:
    """The keys, each after those in its list; otherwise as they are. Raises InputError for a cycle."""
    order: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            cycle = (*path[path.index(name) :], name)
            raise InputError(f"passes that wait for each other can't be ordered: {' after '.join(cycle)}")
        for before in earlier[name]:
            visit(before, (*path, name))
        if name not in order:
            order.append(name)

    for name in earlier:
        visit(name, ())
    return order
