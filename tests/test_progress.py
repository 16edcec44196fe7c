"""The bar over bytes: drawn where someone sees it and it is worth it."""

from __future__ import annotations

import io
import sys

import pytest

from llmlab import progress

LARGE = 1 << 30


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, screen: io.StringIO, total: int) -> str:
    monkeypatch.setattr(sys, "stderr", screen)
    with progress.byte_bar(total, "weights") as advance:
        advance(total // 2)
        advance(total - total // 2)
    return screen.getvalue()


def test_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "weights" in drawn(monkeypatch, Terminal(), LARGE)


def test_nowhere_else_and_not_for_little(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, io.StringIO(), LARGE) == "" and drawn(monkeypatch, Terminal(), 1000) == ""


def stages(monkeypatch: pytest.MonkeyPatch, screen: io.StringIO, wanted: bool) -> str:
    monkeypatch.setattr(sys, "stderr", screen)
    with progress.stage_bar("making", ("cutting", "sewing"), wanted) as begins:
        begins("cutting")
        begins("sewing")
    return screen.getvalue()


def test_stages_are_named_where_someone_sees_them_and_wants_to(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = stages(monkeypatch, Terminal(), True)
    assert shown.index("making: cutting") < shown.index("making: sewing") and "1/2" in shown
    assert stages(monkeypatch, io.StringIO(), True) == "" == stages(monkeypatch, Terminal(), False)
