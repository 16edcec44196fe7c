"""Run every notebook of this folder and save it with its outputs: `make notebooks`."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

from llmlab.notebook.export import without_live_views

HERE = Path(__file__).parent


def save(path: Path) -> None:
    """Execute the notebook `path` in its folder and write it back, without what changes from run to run for nothing."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        store_widget_state=False,
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    without_live_views(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # a progress bar that has gone leaves an empty output
            cell.outputs = [o for o in cell.outputs if o.get("data") != {"text/plain": ""}]
            for output in cell.outputs:  # a live panel is gone with its kernel; its picture stays
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in sorted(HERE.glob("*.ipynb")):
        print(f"running {path.name}", flush=True)
        save(path)
