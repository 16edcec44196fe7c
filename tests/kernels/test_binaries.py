"""Compiled kernels in an engine folder: what is written is what is read, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_kernels import uncompiled

from llmlab.errors import EngineError
from llmlab.kernels import binaries
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.compile import attention_sources
from llmlab.kernels.gpu import geometry
from llmlab.kernels.gpu.geometry import AttentionKind, AttentionVariant

KIND = AttentionKind(4, 2, 16, 16)
VARIANT = AttentionVariant(KIND, rotary=16)
MERGE = VARIANT.constants(geometry.merge(KIND, 1))


def kernels_of(variant: AttentionVariant, architecture: int = 90) -> KernelSet:
    return uncompiled(attention_sources(variant), architecture)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (kernels_of(VARIANT, 80) + kernels_of(VARIANT, 90)).write(tmp_path)
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(EngineError) as caught:
        KernelSet.read(folder)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_what_is_written_is_read(folder: Path) -> None:
    read = KernelSet.read(folder)
    assert read.kernels == (kernels_of(VARIANT, 80) + kernels_of(VARIANT, 90)).kernels
    assert read.architectures == (80, 90) and len(read.kernels) == 14
    assert {p.name for p in folder.iterdir()} == {"kernels.json", *(k.file for k in read.kernels)}


def test_layers_of_one_variant_share_their_kernels() -> None:
    once = kernels_of(VARIANT)
    assert len((once + once).kernels) == len(once.kernels) == 7
    windowed = kernels_of(AttentionVariant(AttentionKind(4, 2, 16, 16, window=8), rotary=16))
    assert len((once + windowed).kernels) == 7 + 4, "the write, the merge and the slots don't know of the window"


@pytest.mark.parametrize(
    ("capability", "found"),
    [((9, 0), 90), ((8, 0), 80), ((8, 9), 80), ((10, 0), None), ((7, 5), None), ((9, 1), None), ((12, 0), None)],
)
def test_a_cubin_is_for_its_architecture_and_before_hopper_for_later_minors(
    folder: Path, capability: tuple[int, int], found: int | None
) -> None:
    kernels = KernelSet.read(folder)
    if found:
        assert kernels.find("merge_splits", MERGE, capability).architecture == found
    else:
        with pytest.raises(
            EngineError, match=rf"no kernels for this GPU \(sm_{capability[0]}{capability[1]}\), only for"
        ):
            kernels.find("merge_splits", MERGE, capability)


def test_the_nearest_architecture_is_preferred() -> None:
    kernels = kernels_of(VARIANT, 80) + kernels_of(VARIANT, 86)
    assert [kernels.find("merge_splits", MERGE, (8, minor)).architecture for minor in (0, 6, 9)] == [80, 86, 86]


def test_a_kernel_for_other_constants_is_not_taken(folder: Path) -> None:
    kernels = KernelSet.read(folder)
    for other in ({"HEAD_DIM": 32}, {"DTYPE": "bfloat16"}, {"SINKS": True}):
        with pytest.raises(EngineError, match=r"no kernel merge_splits with .*: build the engine again"):
            kernels.find("merge_splits", {**MERGE, **other}, (9, 0))
    decode = VARIANT.constants(geometry.decode(KIND, 1, 2))
    assert kernels.find("paged_decode", {**decode, "TILE": 16}, (9, 0)).constants["TILE"] == 128, "tuned where compiled"


def test_an_altered_or_missing_cubin(folder: Path) -> None:
    file = folder / KernelSet.read(folder).kernels[0].file
    file.write_bytes(b"x" + file.read_bytes())
    assert refused(folder) == f"{file} was altered after the build (its SHA-256 differs): build the engine again"
    file.unlink()
    assert "can't be read (No such file" in refused(folder)


def altered(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "kernels.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return apply


def record(**values: Any) -> Callable[[Path], None]:
    return altered(lambda index: index["kernels"][0].update(values))


BROKEN = {
    "no JSON": (lambda folder: (folder / "kernels.json").write_text("{"), "not valid JSON"),
    "a list": (lambda folder: (folder / "kernels.json").write_text("[]"), "not an index of version 1"),
    "another version": (altered(lambda index: index.update(version=2)), "not an index of version 1"),
    "no list": (altered(lambda index: index.update(kernels={})), "expected a list"),
    "too many": (altered(lambda index: index.update(kernels=[1] * 5000)), "a list of at most 4096"),
    "a number": (altered(lambda index: index["kernels"].insert(0, 3)), "no plain file name"),
    "another folder": (record(file="../secret.cubin"), "no plain file name"),
    "no name": (altered(lambda index: index["kernels"][0].pop("name")), "can't be used"),
    "a list as constant": (record(constants={"A": [1]}), "can't be used"),
    "an architecture in words": (record(architecture="90"), "can't be used"),
    "true warps": (record(num_warps=True), "can't be used"),
    "no warps": (record(num_warps=0), "can't be used"),
    "much shared memory": (record(shared=1 << 30), "can't be used"),
    "an unknown type": (record(parameters=[["a", "f64"]]), "can't be used"),
    "a parameter of three": (record(parameters=[["a", "ptr", 1]]), "can't be used"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_index_is_refused_in_one_line(folder: Path, name: str) -> None:
    spoil, expected = BROKEN[name]
    spoil(folder)
    assert expected in refused(folder)


def test_a_huge_cubin_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "_CUBIN_LIMIT", 4)
    assert "more than the 4 that such a file may have" in refused(folder)
