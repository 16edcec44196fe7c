"""Folders are written whole or not at all; files from strangers are read with limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmlab import files
from llmlab.errors import CheckpointError, InputError
from llmlab.files import atomic_folder, plain_name, read_bytes, read_json, sha256, write_json

STOPS = (RuntimeError, KeyboardInterrupt, SystemExit)


def write(path: Path, content: str, *, overwrite: bool = False) -> None:
    with atomic_folder(path, overwrite=overwrite, marker="marker") as work:
        (work / "marker").write_text("ours")
        (work / "data").write_text(content)


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "out"
    with atomic_folder(path, overwrite=False, marker="marker") as work:
        (work / "marker").write_text("x")
        assert not path.exists() and work.parent == path.parent
    assert contents(path) == {"marker": "x"} and [p.name for p in path.parent.iterdir()] == ["out"]
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("there", [False, True])
def test_an_interruption_leaves_nothing_behind(tmp_path: Path, stop: type[BaseException], there: bool) -> None:
    path = tmp_path / "out"
    if there:
        write(path, "old")
    before = contents(tmp_path)
    with pytest.raises(stop), atomic_folder(path, overwrite=True, marker="marker") as work:
        (work / "marker").write_text("half")
        raise stop
    assert contents(tmp_path) == before and path.exists() == there
    assert len(list(tmp_path.iterdir())) == there


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("at", ["before", "between", "after"])
def test_an_interruption_of_the_swap_keeps_one_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException], at: str
) -> None:
    path = tmp_path / "out"
    write(path, "old")
    real, calls = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 1 and at in ("before", "after"):
            if at == "after":
                real(self, target)
            raise stop
        if len(calls) == 2 and at == "between":
            raise stop
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(stop):
        write(path, "new", overwrite=True)
    assert contents(path) == {"marker": "ours", "data": "old"} and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "out", "new")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write(path, "old")
    with pytest.raises(InputError, match="pass overwrite"):
        write(path, "new")
    assert contents(path)["data"] == "old"
    write(path, "new", overwrite=True)
    assert contents(path)["data"] == "new" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "new")
    assert contents(tmp_path / "out")["data"] == "new"


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_llmlab_did_not_write_is_never_removed(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="holds no marker: choose an empty or a new folder"):
        write(tmp_path / "thesis", "new", overwrite=overwrite)
    with pytest.raises(InputError, match="exists and is not a folder"):
        write(tmp_path / "file", "new", overwrite=overwrite)
    assert contents(tmp_path) == {"thesis/chapter": "years of work", "file": "x"}


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "out", tmp_path / ("n" * 300), tmp_path / "a\0b"):
        with pytest.raises(InputError, match="can't be written") as caught:
            write(path, "new")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\0"])
def test_names_that_lead_elsewhere(name: str) -> None:
    assert not plain_name(name)


def test_plain_names() -> None:
    assert all(map(plain_name, ("model.onnx", "..x", "ä b")))


def test_reading_has_limits(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[1]" + " " * 100)
    assert read_json(path, CheckpointError) == [1]
    with pytest.raises(CheckpointError, match="103 bytes, more than the 50"):
        read_bytes(path, CheckpointError, limit=50)
    with pytest.raises(CheckpointError, match="can't be read"):
        read_bytes(tmp_path / "missing", CheckpointError)
    with pytest.raises(CheckpointError, match="can't be read"):
        read_bytes(tmp_path, CheckpointError)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe{", b"[" * 100_000, b"nul"])
def test_broken_json_is_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not valid JSON") as caught:
        read_json(path, CheckpointError)
    assert "\n" not in str(caught.value)


def test_json_and_hash(tmp_path: Path) -> None:
    write_json(tmp_path / "x", {"ä": 1})
    assert read_json(tmp_path / "x", CheckpointError) == {"ä": 1}
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
