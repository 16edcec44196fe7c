"""The table of what works is what was measured: the README, the command line and the tests speak of the same families."""

from __future__ import annotations

import json
import math
from pathlib import Path

from families import FAMILIES
from typer.testing import CliRunner

from llmlab import cli
from llmlab.graph.architectures import markdown, measured

README = Path(__file__).parents[2] / "README.md"
AGAIN = "run `make architectures`"


def test_every_family_was_measured_as_the_tests_have_it() -> None:
    found = {f["family"]: f["features"] for f in measured()["families"]}
    assert found == {name: family.features for name, family in FAMILIES.items()}, AGAIN


def test_what_was_measured_is_right_and_a_mistake_was_seen() -> None:
    for family in measured()["families"]:
        assert 0 < family["error"] < 1e-4 and family["control"] > 1e-2 and math.isfinite(family["control"])
        assert family["decode_steps"] >= 24
    for other in measured()["others"]:
        assert ("error" in other) != ("refused" in other)
        assert other.get("error", 0) < 1e-4 and "\n" not in other.get("refused", "")


def test_the_readme_shows_it() -> None:
    text = README.read_text(encoding="utf-8")
    section = text.partition("<!-- architectures -->\n")[2].partition("<!-- /architectures -->")[0]
    assert section == markdown(), f"{AGAIN}, or `python benchmarks/architectures.py --readme`"


def test_inspect_shows_it() -> None:
    runner = CliRunner(env={"COLUMNS": "160"})
    table = runner.invoke(cli.app, ["inspect", "--architectures"])
    assert table.exit_code == 0 and all(name in table.stdout for name in FAMILIES)
    data = json.loads(runner.invoke(cli.app, ["inspect", "--architectures", "--json"]).stdout)
    assert data.pop("kind") == "architectures" and data == measured()


def test_it_takes_nothing_else() -> None:
    for more in (["tinychat"], ["--passes"]):
        result = CliRunner().invoke(cli.app, ["inspect", "--architectures", *more])
        assert result.exit_code == 2 and "--architectures" in result.output
