"""Plans built from ONNX files by TensorRT-RTX, which needs no GPU for that."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import trt_graphs

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("polygraphy")

from llmlab.errors import EngineError, InputError, LlmlabError, UnsupportedModelError
from llmlab.tensorrt import builder as building
from llmlab.tensorrt.builder import Plan, PlanBuilder, build_plan
from llmlab.tensorrt.config import BuildConfig
from llmlab.tensorrt.library import Library, resolve
from llmlab.tensorrt.progress import BuildProgress

GPUS = ((8, 0), (8, 9), (12, 0))
CONFIG = BuildConfig(max_batch=8, max_tokens_per_step=32, decode_buckets=(1,), compute_capabilities=GPUS)
INPUTS = {"x": ("T", trt_graphs.WIDTH)}


@pytest.fixture(scope="module")
def library() -> Library:
    return resolve("tensorrt-rtx")


@pytest.fixture(scope="module")
def plan(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = trt_graphs.mlp(tmp_path_factory.mktemp("mlp") / "mlp.onnx")
    return build_plan(library, path, CONFIG.profiles(INPUTS), CONFIG)


def test_a_plan_for_three_gpus_with_two_profiles(plan: Plan) -> None:
    assert plan.data.nbytes > 3 * 2 * trt_graphs.WIDTH * trt_graphs.HIDDEN
    assert (
        plan.listing.startswith("Layers:") and "MinShape: [1,64], OptShape: [32,64], MaxShape: [32,64]" in plan.listing
    )
    assert all(f"sm{major}{minor} " in bytes(plan.data).decode("latin-1") for major, minor in GPUS)


def test_parts_are_built_one_after_the_other_from_files_with_weights_beside_them(
    library: Library, tmp_path: Path
) -> None:
    with PlanBuilder(library, CONFIG, total=2) as builder:
        plans = [
            builder.build(
                trt_graphs.mlp(tmp_path / f"{i}.onnx", external=True, seed=i),
                CONFIG.profiles(INPUTS),
                name=f"layer {i}",
            )
            for i in range(2)
        ]
    assert bytes(plans[0].data) != bytes(plans[1].data)


def test_a_gpu_that_it_does_not_build_for(library: Library) -> None:
    with pytest.raises(InputError, match=r"doesn't build for compute capability 9\.0, only for 7\.5, 8\.0") as caught:
        PlanBuilder(library, BuildConfig(compute_capabilities=((9, 0),)))
    assert "\n" not in str(caught.value)


def test_ctrl_c_stops_within_a_part_and_the_next_build_works(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trt_graphs.mlp(tmp_path / "mlp.onnx")
    stopped: list[bool] = []

    def interrupting(trt: Any, progress: Any, stop: threading.Event) -> Any:
        monitor = make_monitor(trt, progress, stop)

        def phase_start(name: str, parent: str | None, steps: int) -> None:
            if not stopped:
                os.kill(os.getpid(), signal.SIGINT)
                stopped.append(stop.wait(10))

        monitor.phase_start = phase_start
        return monitor

    make_monitor = building.make_monitor
    monkeypatch.setattr(building, "make_monitor", interrupting)
    config = replace(CONFIG, timing_cache=tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt), PlanBuilder(library, config, total=2) as builder:
        builder.build(path, CONFIG.profiles(INPUTS), name="layers.0")
    assert stopped == [True] and "llmlab-build" not in [thread.name for thread in threading.enumerate()]
    assert [file.name for file in tmp_path.iterdir()] == ["mlp.onnx"]
    assert build_plan(library, path, CONFIG.profiles(INPUTS), CONFIG).data.nbytes


def test_how_long_it_took_is_said_the_next_time(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trt_graphs.mlp(tmp_path / "mlp.onnx")
    said: list[tuple[str, float | None]] = []
    monkeypatch.setattr(building.BuildProgress, "watch", lambda self, name, last, seconds: said.append((name, last)))
    monkeypatch.setattr("llmlab.tensorrt.progress._TICK", 0.01)
    config = replace(CONFIG, timing_cache=tmp_path / "cache")
    for _ in range(2):
        with PlanBuilder(library, config) as builder:
            plan = builder.build(path, CONFIG.profiles(INPUTS), name="layers.0", key="layer")
    assert said[0] == ("layers.0", None)
    name, last = said[-1]
    assert name == "layers.0" and last is not None and last != plan.seconds and 0 < last < 60


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_the_bar_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    progress = BuildProgress(3)
    progress.done()
    progress.phase = "Timing tactics"
    progress.watch("layers.1", 42.4, 3.2)
    progress.watch("layers.1", None, 4.0)
    progress.close()
    assert "1/3 parts" in screen.getvalue()
    assert (
        "layers.1 3 s, 42 s last time: Timing tactics" in screen.getvalue()
        and "layers.1 4 s: Timing" in screen.getvalue()
    )


def altered(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        model = onnx.load(trt_graphs.mlp(path))
        change(model)
        onnx.save(model, path)
        return path

    return write


def without_weights(path: Path) -> Path:
    trt_graphs.mlp(path, external=True)
    path.with_suffix(".bin").unlink()
    return path


@pytest.mark.parametrize(
    ("write", "kind", "said"),
    [
        (
            altered(lambda m: setattr(m.graph.node[4], "op_type", "Nope")),
            UnsupportedModelError,
            'can\'t be parsed by {}: While parsing node number 4 [Nope -> "up"]; ',
        ),
        (
            altered(lambda m: m.graph.node[3].input.__setitem__(1, "down_weight")),
            UnsupportedModelError,
            "can't be parsed by {}: ITensor::getDimensions: Error Code 4: API Usage Error (gate: last dimension of input0",
        ),
        (without_weights, UnsupportedModelError, "can't be parsed by {}: Failed to open file: "),
        (
            altered(lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 32)),
            UnsupportedModelError,
            "can't be parsed by {}: ",
        ),
    ],
)
def test_files_that_cannot_be_parsed(
    library: Library, tmp_path: Path, write: Callable[[Path], Path], kind: type[LlmlabError], said: str
) -> None:
    path = write(tmp_path / "layer.onnx")
    with pytest.raises(kind) as caught:
        build_plan(library, path, CONFIG.profiles(INPUTS), CONFIG)
    text = str(caught.value)
    assert type(caught.value) is kind and text.startswith("layer.onnx " + said.format(library)), text
    assert "\n" not in text and "cudaError" not in text and ".cpp" not in text and len(text) < 500


def test_profiles_and_limits_that_do_not_fit(library: Library, tmp_path: Path) -> None:
    path = trt_graphs.mlp(tmp_path / "layer.onnx")
    with pytest.raises(
        InputError, match=r"layer\.onnx: input x has the shape \(-1, 64\), expected its sizes in each profile"
    ):
        build_plan(library, path, [], CONFIG)
    with pytest.raises(EngineError, match=r"can't be built by .*Dimension mismatch for tensor x and profile 0"):
        build_plan(library, path, [{"x": ((1, 32),) * 3}], CONFIG)
    with pytest.raises(EngineError, match="no tactics to implement the operation within workspace limit"):
        build_plan(library, path, CONFIG.profiles(INPUTS), replace(CONFIG, workspace_bytes=1 << 20))
    with pytest.raises(InputError, match="refit=True compiles on the GPU, and there is none"):
        build_plan(library, path, CONFIG.profiles(INPUTS), replace(CONFIG, refit=True))
    with pytest.raises(InputError, match=r"nowhere\.onnx: no such file"):
        build_plan(library, tmp_path / "nowhere.onnx", CONFIG.profiles(INPUTS), CONFIG)
