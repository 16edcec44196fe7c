"""Each saved notebook as a page of HTML: it opens without a network, and its pictures are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmlab.notebook.export import export_html

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))

EMPTY = """() => [...document.querySelectorAll("main img, main svg, main .plotly-graph-div, main table")]
  .filter((e) => !(e.tagName === "svg" && e.parentElement.closest("svg, .plotly-graph-div")) && e.checkVisibility())
  .filter((e) => { const box = e.getBoundingClientRect(); return box.width < 8 || box.height < 8 || e.naturalWidth === 0; })
  .map((e) => e.outerHTML.slice(0, 200))"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_page_shows_all_pictures_without_a_network(lab, path: Path, tmp_path: Path) -> None:
    page = export_html(path, tmp_path / "page.html")
    lab.page.goto(page.as_uri())
    lab.page.wait_for_selector("main h1")
    assert lab.page.evaluate(EMPTY) == []
    assert lab.page.evaluate("() => document.querySelectorAll('main svg, main table, main img').length") > 0
    outputs = lab.page.locator("main .jp-OutputArea-output")
    assert outputs.count() > 3 and "model not found" not in lab.page.locator("main").inner_text()
    lab.page.screenshot(path=lab.pictures / f"page-{path.stem}.png", full_page=True)


def test_the_check_sees_what_is_missing(lab, tmp_path: Path) -> None:
    page, elsewhere = tmp_path / "page.html", "https:" + "//example.org"
    page.write_text(
        f"<main><img src='missing.png'><svg width=0 height=0></svg></main><script>fetch('{elsewhere}').catch(() => 0)</script>"
    )
    lab.page.goto(page.as_uri())
    lab.page.wait_for_load_state("networkidle")
    assert len(lab.page.evaluate(EMPTY)) == 2
    assert any("asked outside" in line for line in lab.complaints())
