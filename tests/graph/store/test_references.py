"""Graphs that leave their weights in the checkpoint: small on the disk, and no key to other people's files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Store
from small_graphs import padded_tokens, run

from llmlab.build import build
from llmlab.errors import GraphError
from llmlab.graph.export import export
from llmlab.graph.graph import MANIFEST, Graph
from llmlab.graph.optimize import optimize
from llmlab.graph.store.storage import WEIGHTS, constants


@pytest.fixture(scope="module")
def saved(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and the graph that refers to it."""
    folder = tmp_path_factory.mktemp("references")
    shutil.copytree(store.checkpoint("llama"), folder / "checkpoint")
    export(folder / "checkpoint").save(folder / "graph", copy_weights=False)
    return folder


@pytest.fixture
def both(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be altered; copying keeps the times, and the paths are those of the copy."""
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    alter(copy, lambda entry: entry.update(path=entry["path"].replace(str(saved), str(copy))))
    return copy


def alter(both: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((both / "graph" / MANIFEST).read_text())
    for entry in manifest["references"]:
        change(entry)
    (both / "graph" / MANIFEST).write_text(json.dumps(manifest))


def refusal(both: Path, weights_from: Path | None) -> str:
    with pytest.raises(GraphError) as caught:
        Graph.load(both / "graph", weights_from=weights_from)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_same_graph_comes_back(both: Path, store: Store) -> None:
    graph = Graph.load(both / "graph", weights_from=both / "checkpoint")
    whole = store.plain("llama")
    assert (
        both / "graph" / WEIGHTS
    ).stat().st_size < whole.weight_bytes / 10 and graph.weight_bytes == whole.weight_bytes
    for found, expected in zip(run(graph, padded_tokens()), run(whole, padded_tokens()), strict=True):
        assert np.array_equal(found, expected)


def test_an_optimized_graph_refers_as_well_and_builds(both: Path, tmp_path: Path) -> None:
    graph = Graph.load(both / "graph", weights_from=both / "checkpoint")
    optimize(graph).save(both / "serving", copy_weights=False)
    again = Graph.load(both / "serving", weights_from=both / "checkpoint")
    one, two = (
        build(g, tmp_path / n, max_tokens_per_step=32).manifest.files for g, n in ((optimize(graph), "a"), (again, "b"))
    )
    assert one["weights.bin"] == two["weights.bin"], "the same weights, by their hash"


def test_nothing_is_read_that_nobody_allowed(both: Path) -> None:
    folder = str((both / "checkpoint").resolve())
    assert f"refers to weights in {folder!r}; name that folder if you trust it" in refusal(both, None)
    assert "which is not in" in refusal(both, both / "graph")


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../../../../etc/passwd", "model.safetensors", "\0"])
def test_a_path_outside_the_folder_is_refused(both: Path, path: str) -> None:
    info = Path("/etc/passwd").stat()
    alter(both, lambda entry: entry.update(path=path, size=info.st_size, mtime_ns=info.st_mtime_ns))
    message = refusal(both, both / "checkpoint")
    assert "which is not in" in message or "no longer there" in message


def test_a_link_out_of_the_folder_is_refused(both: Path, tmp_path: Path) -> None:
    weights = both / "checkpoint" / "model.safetensors"
    weights.rename(tmp_path / "outside")
    weights.symlink_to(tmp_path / "outside")
    assert "which is not in" in refusal(both, both / "checkpoint")


@pytest.mark.parametrize("how", ["touched", "shorter", "gone", "a folder", "a pipe"])
def test_a_file_that_changed_is_refused(both: Path, how: str) -> None:
    weights = both / "checkpoint" / "model.safetensors"
    time = weights.stat().st_mtime_ns
    if how == "touched":
        os.utime(weights, ns=(time, time + 1))
    elif how == "shorter":
        os.truncate(weights, 1000)
        os.utime(weights, ns=(time, time))
    else:
        weights.unlink()
    if how == "a folder":
        weights.mkdir()
    elif how == "a pipe":
        os.mkfifo(weights)
    message = refusal(both, both / "checkpoint")
    assert ("changed since the graph was saved" if how in ("touched", "shorter") else "no longer there") in message


@pytest.mark.parametrize(
    "entries", [3, [3], [{}], [{"name": "reference/0", "path": 3, "size": 1, "mtime_ns": 1}], {"a": 1}]
)
def test_lists_that_are_malformed(both: Path, entries: Any) -> None:
    manifest = json.loads((both / "graph" / MANIFEST).read_text()) | {"references": entries}
    (both / "graph" / MANIFEST).write_text(json.dumps(manifest))
    assert "malformed" in refusal(both, both / "checkpoint")


def test_a_graph_saved_over_itself_keeps_its_own_weights(store: Store, tmp_path: Path) -> None:
    """It can't refer to files that are being replaced."""
    store.plain("llama").save(tmp_path / "g")
    graph = Graph.load(tmp_path / "g")
    before = {t.name: np.array(t.values) for t in constants(graph.surgeon)}
    graph.save(tmp_path / "g", overwrite=True, copy_weights=False)
    after = {t.name: np.array(t.values) for t in constants(Graph.load(tmp_path / "g").surgeon)}
    assert before.keys() == after.keys() and all(np.array_equal(before[n], after[n]) for n in before)
