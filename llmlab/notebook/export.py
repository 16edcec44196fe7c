"""A notebook as a page of its own: what it shows, with nothing to load from anywhere."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from llmlab.errors import require
from llmlab.files import write_text
from llmlab.notebook.run import as_ipynb

LIVE = "application/vnd.jupyter.widget-view+json"
FIGURE = "application/vnd.plotly.v1+json"


def export_html(path: str | Path, out: str | Path | None = None) -> Path:
    """Write the notebook `path` (.ipynb, or .py as jupytext writes it), as it was saved, as one page of HTML.

    out: the page (default: beside the notebook, with the suffix .html)
    The page needs no network: panels are there as pictures, plotly's figures bring plotly with them.
    Raises InputError for what is no notebook.
    """
    nbconvert, nbformat = require("nbconvert", "notebook"), require("nbformat", "notebook")
    source = Path(path)
    with tempfile.TemporaryDirectory(prefix="llmlab-notebook-") as folder:
        notebook = nbformat.read(as_ipynb(source, Path(folder)), as_version=4)
    without_live_views(notebook)
    _draw_figures(notebook)
    exporter = nbconvert.HTMLExporter(mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url="")
    title = next((line.lstrip("# ") for c in notebook.cells for line in c.source.splitlines()), source.stem)
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": title}})
    target = Path(out) if out is not None else source.with_suffix(".html")
    write_text(target, page)
    return target


def without_live_views(notebook: Any) -> None:
    """Take out of the outputs what only a running kernel can show, where a picture stands beside it."""
    for output in _outputs(notebook):
        if "text/html" in output.data:
            output.data.pop(LIVE, None)
    notebook.metadata.pop("widgets", None)


def _draw_figures(notebook: Any) -> None:
    """HTML for figures that are there as data alone; the first brings plotly's script."""
    first = True
    for output in _outputs(notebook):
        if FIGURE in output.data and "text/html" not in output.data:
            io = require("plotly.io", "notebook")
            figure = io.from_json(json.dumps(output.data[FIGURE]), skip_invalid=True)
            output.data["text/html"] = io.to_html(figure, full_html=False, include_plotlyjs=first)
            first = False


def _outputs(notebook: Any) -> list[Any]:
    """The outputs that have data."""
    return [output for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
