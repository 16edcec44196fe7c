"""Which TensorRT is there: what it can do, and one line where it isn't."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import fake_driver
import pytest

from llmlab.errors import EngineError, InputError, MissingDependencyError
from llmlab.tensorrt.library import Library, resolve
from llmlab.tensorrt.log import Heard

find = resolve.__wrapped__
"""`resolve` that looks anew."""


@pytest.fixture
def gpu() -> Iterator[fake_driver.FakeDriver]:
    with fake_driver.installed(fake_driver.FakeDriver((9, 0))) as driver:
        yield driver


def refusal(kind: Any) -> str:
    with pytest.raises(MissingDependencyError) as caught:
        find(kind)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rtx() -> None:
    pytest.importorskip("tensorrt_rtx")
    library = resolve("tensorrt-rtx")
    assert library is resolve("tensorrt-rtx") and str(library).startswith("TensorRT-RTX 1.")
    assert library.hostings == ("plugin", "piecewise", "native") and library.hosting(None) == "plugin"
    assert library.strongly_typed and library.opset == 23 and library.progress_monitor and not library.needs_gpu
    assert {"float16", "bfloat16", "int8", "int4", "float8"} <= set(library.precisions)
    assert (8, 9) in library.compute_capabilities and (9, 0) not in library.compute_capabilities
    libs = sys.modules["tensorrt_rtx_libs"].__path__[0]
    assert (Path(libs) / "libtensorrt_rtx.so").is_file(), "without it a plugin node ends the process"


def test_the_link_is_made_or_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmlab.tensorrt import installed

    folder = tmp_path / "tensorrt_rtx_libs"
    folder.mkdir()
    (folder / "libtensorrt_rtx.so.1").write_bytes(b"")
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: spec)
    installed.link_rtx()
    installed.link_rtx()
    assert (folder / "libtensorrt_rtx.so").readlink() == Path("libtensorrt_rtx.so.1")
    (folder / "libtensorrt_rtx.so").unlink()

    def refuse(self: Path, target: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(
        MissingDependencyError, match=r"must be a link to libtensorrt_rtx\.so\.1 and can't be made \(Perm"
    ):
        installed.link_rtx()


@pytest.mark.parametrize("kind", ["tensorrt", "tensorrt-rtx"])
def test_absent(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = kind.replace("-", "_")
    monkeypatch.setitem(sys.modules, name, None)
    assert refusal(kind).startswith(f"{name} can't be imported") and f"pip install 'llmlab[{kind}]'" in refusal(kind)


def test_absent_beside_a_gpu(gpu: fake_driver.FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "here is a Fake GPU, compute capability 9.0: pip install 'llmlab[tensorrt]'" in refusal("tensorrt")
    assert "compute capability 9.0, which TensorRT-RTX doesn't serve: use target='tensorrt'" in refusal("tensorrt-rtx")


def test_a_folder_of_that_name_is_not_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "tensorrt is a folder on the path" in refusal("tensorrt")
    sys.modules.pop("tensorrt", None)


def test_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("tensorrt")
    old.__file__, old.__version__ = "there", "8.5.3.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    assert refusal("tensorrt").startswith("tensorrt is 8.5.3.1, llmlab needs 8.6 or newer: pip install")


def test_no_kind() -> None:
    with pytest.raises(InputError, match="'cuda' is no kind of TensorRT; available: tensorrt, tensorrt-rtx"):
        find("cuda")  # type: ignore[arg-type]


def newer(version: tuple[int, ...], *features: str) -> Library:
    """A library as far as its answers go; `features`: what its module has beside what all have."""
    has: dict[str, Any] = {
        "LayerType": SimpleNamespace(),
        "PreviewFeature": SimpleNamespace(),
        "DataType": SimpleNamespace(),
    }
    for feature in features:
        owner, _, member = feature.rpartition(".")
        (vars(has[owner]) if owner else has)[member] = object()
    return Library("tensorrt", SimpleNamespace(**has), version, None, Heard())  # type: ignore[arg-type]


def test_what_versions_between_can_do() -> None:
    plugins = ("IPluginV3", "PreviewFeature.ALIASED_PLUGIN_IO_10_03")
    assert newer((10, 0), "IPluginV3").hostings == ("piecewise",)
    assert newer((10, 3), *plugins).hostings == ("plugin", "piecewise")
    latest = newer((11, 5), *plugins, "LayerType.KV_CACHE_UPDATE")
    assert (
        latest.hostings == ("plugin", "piecewise", "native")
        and latest.opset == 23
        and latest.hosting("native") == "native"
    )
    assert not newer((9, 3)).strongly_typed and newer((10, 0)).strongly_typed and newer((10, 3)).opset == 17
    assert newer((9, 3)).timing_cache_bytes and not newer((8, 6)).timing_cache_bytes
    with pytest.raises(
        InputError, match=r"attention='native' needs a newer TensorRT than TensorRT 10\.3; available: plugin, p"
    ):
        newer((10, 3), *plugins).hosting("native")


def test_rtx_builds_for_the_gpu_that_is_here_or_those_that_are_named(gpu: fake_driver.FakeDriver) -> None:
    pytest.importorskip("tensorrt_rtx")
    library = resolve("tensorrt-rtx")
    assert library.check_capabilities([(8, 9), (8, 9)]) == ((8, 9),)
    with pytest.raises(
        InputError, match=r"doesn't build for compute capability 9\.0, only for .*: use target='tensorrt'"
    ):
        library.check_capabilities([])
    with fake_driver.installed(fake_driver.FakeDriver((12, 0))):
        assert library.check_capabilities([]) == ((12, 0),)
    gpu.refuse["cuInit"] = "CUDA_ERROR_NO_DEVICE"
    with pytest.raises(
        InputError, match=r"compute_capabilities is empty and no GPU is visible: name the GPUs to build for"
    ):
        library.check_capabilities([])


def test_a_plan_is_not_opened_without_a_gpu(gpu: fake_driver.FakeDriver) -> None:
    pytest.importorskip("tensorrt_rtx")
    gpu.refuse["cuInit"] = "CUDA_ERROR_NO_DEVICE"
    with pytest.raises(EngineError, match="finds no NVIDIA GPU here: go to a machine where nvidia-smi lists one"):
        find("tensorrt-rtx").load(b"plan")
