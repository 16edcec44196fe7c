"""The README keeps its word: its Python runs as it stands, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import Store

import llmlab

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)


def test_the_python_runs(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands, but for the export, which the demo and the first notebook run as it stands here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llmlab, "export", store.plain)
    [code] = blocks("python")
    exec(compile(code, str(README), "exec"), {})
    out = capsys.readouterr().out
    answer = re.search(r"print\(answer\.text\)\s*# (.*)", code)
    assert answer is not None and out.splitlines()[0] == answer.group(1)
    assert (tmp_path / "engines" / "tinychat" / "manifest.json").is_file()


def test_its_commands_and_verbs_exist() -> None:
    from typer.main import get_command

    from llmlab.cli import app

    console = "\n".join(blocks("console"))
    verbs = set(re.findall(r"^\$ llmlab (\w+)", console, re.M))
    targets = set(re.findall(r"^\$ make (\w+)", console, re.M))
    known = get_command(app).commands  # type: ignore[attr-defined]
    assert verbs == set(known) - {"export", "optimize"} and targets == {"demo", "test"}
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README.read_text(encoding="utf-8"))
    assert links and all((README.parent / link).exists() for link in links)
