"""What TensorRT 8.6 is asked for. Run by test_trt_weak.py, in a process where `tensorrt` is the stand-in beside this file."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_driver
import numpy as np
import onnx
import pytest
import tensorrt as trt
import trt_graphs
from onnx import helper, numpy_helper

from llmlab.errors import LlmlabError
from llmlab.tensorrt.builder import Plan, PlanBuilder, build_plan
from llmlab.tensorrt.config import BuildConfig
from llmlab.tensorrt.library import resolve
from llmlab.tensorrt.precision import WeakTyping
from llmlab.tensorrt.refit import refit
from llmlab.tensorrt.timing import TimingCache

INPUTS = {"x": ("T", 64)}
CONFIG = BuildConfig(max_batch=8, max_tokens_per_step=32, decode_buckets=(1, 8))
WEAK = WeakTyping(io={"x": "float16", "y": "float16"}, float32=trt_graphs.NORM)
library = resolve("tensorrt")


@pytest.fixture(autouse=True)
def driver() -> Iterator[fake_driver.FakeDriver]:
    trt.calls.clear()
    trt.fail.clear()
    with fake_driver.installed(fake_driver.FakeDriver((9, 0))) as driver:
        yield driver


@pytest.fixture
def onnx_path(tmp_path: Path) -> Path:
    return trt_graphs.weak_mlp(tmp_path / "mlp.onnx")


def build(path: Path, config: BuildConfig = CONFIG, weak: WeakTyping = WEAK) -> Plan:
    return build_plan(library, path, config.profiles(INPUTS), config, name="layers.0", weak=weak)


def named(function: str) -> list[Any]:
    return [arguments for name, arguments in trt.calls if name == function]


def line(run: Callable[[], object]) -> str:
    with pytest.raises(LlmlabError) as caught:
        run()
    assert "\n" not in str(caught.value)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_what_is_declared_and_configured(onnx_path: Path) -> None:
    assert (str(library), library.opset, library.hostings) == ("TensorRT 8.6.1", 17, ("piecewise",))
    assert not library.strongly_typed and library.precisions == ("float32", "float16", "int8")
    plan = build(onnx_path, replace(CONFIG, optimization_level=2, workspace_bytes=1 << 30))
    [asked] = named("build")
    assert json.loads(bytes(plan.data)) == asked and plan.listing == ""
    assert asked["flags"] == ["FP16", "OBEY_PRECISION_CONSTRAINTS"]
    assert (asked["tactic_sources"], asked["level"], asked["WORKSPACE"]) == (0, 2, 1 << 30)
    assert (asked["verbosity"], asked["compatibility"]) == ("DETAILED", "NONE")
    assert [p["x"] for p in asked["profiles"]] == [[[1, 64]] * 3, [[8, 64]] * 3, [[1, 64], [32, 64], [32, 64]]]
    assert named("create_network") == [1], "explicit batch"
    assert named("parse_from_file") == [str(onnx_path)], "by path, so that weights may lie beside it"
    assert named("dtype") == [["x", "HALF"], ["y", "HALF"]]
    assert named("precision") == [[name, "FLOAT"] for name in trt_graphs.NORM]
    assert named("set_output_type") == [[name, "FLOAT"] for name in trt_graphs.NORM[:-1]], (
        "the product may read it narrow"
    )


def test_one_timing_cache_for_all_parts_and_only_times_in_its_file(onnx_path: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, timing_cache=tmp_path / "cache")
    with PlanBuilder(library, config, total=3) as builder:
        for name in ("a", "b"):
            builder.build(onnx_path, config.profiles(INPUTS), name=name, key="layer", weak=WEAK)
    first, second = (asked["cache"] for asked in named("build"))
    assert first == second
    build(onnx_path)
    assert named("build")[2]["cache"] != first, "another builder has another cache: the check can fail"
    data = (tmp_path / "cache").read_bytes()
    assert b'"layer": ' in data and b"measured" not in data
    assert list(TimingCache(library, tmp_path / "cache").seconds) == ["layer"]


def test_the_time_that_is_remembered_is_that_of_the_first_part_of_a_kind(
    onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, timing_cache=tmp_path / "cache")
    with PlanBuilder(library, config, total=2) as builder:
        monkeypatch.setattr(trt, "build_seconds", 0.2)
        slow = builder.build(onnx_path, config.profiles(INPUTS), name="a", key="layer", weak=WEAK)
        monkeypatch.setattr(trt, "build_seconds", 0.0)
        fast = builder.build(onnx_path, config.profiles(INPUTS), name="b", key="layer", weak=WEAK)
    assert fast.seconds < slow.seconds == TimingCache(library, tmp_path / "cache").seconds["layer"]


def test_a_later_version_reads_what_was_measured_unless_it_was_altered(onnx_path: Path, tmp_path: Path) -> None:
    later = replace(library, version=(9, 3))
    file = tmp_path / "cache"

    def read() -> bytes:
        config = trt.Config()
        TimingCache(later, file).attach(config)
        assert config.cache is not None
        return config.cache.data

    def write() -> bytes:
        with PlanBuilder(later, replace(CONFIG, timing_cache=file)) as builder:
            builder.build(onnx_path, CONFIG.profiles(INPUTS), name="a", weak=WEAK)
        return file.read_bytes()

    data = write()
    assert read() == b"measured"
    for damaged in (data[:-1] + b"!", data[:40], b"", b"\n\n\n", data.replace(b"9.3", b"9.2")):
        file.write_bytes(damaged)
        assert read() == b"", damaged
    assert write() == data or read() == b"measured", "a damaged file is replaced"
    file.unlink()
    file.mkdir()
    assert line(write) == f"InputError: {file}: can't be read (not a regular file)"


def test_int8_is_allowed_where_the_file_has_it_and_float32_stays_wide(onnx_path: Path, tmp_path: Path) -> None:
    model = onnx.load(onnx_path)
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["gate_weight", "s"], ["q"], name="q"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.1, np.float32), "s"))
    onnx.save(model, tmp_path / "int8.onnx")
    build(tmp_path / "int8.onnx")
    build(onnx_path, replace(CONFIG, precision="float32"))
    constraints = "OBEY_PRECISION_CONSTRAINTS"
    assert [asked["flags"] for asked in named("build")] == [["FP16", "INT8", constraints], [constraints]]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"precision": "bfloat16"}, "precision is 'bfloat16', TensorRT 8.6.1 has float32, float16, int8"),
        (
            {"attention": "plugin"},
            "attention='plugin' needs a newer TensorRT than TensorRT 8.6.1; available: piecewise",
        ),
        (
            {"compute_capabilities": ((7, 5),)},
            "TensorRT 8.6.1 builds on the GPU itself, here a Fake GPU of compute capability 9.0, not for 7.5: build there",
        ),
    ],
)
def test_what_it_cannot_do(onnx_path: Path, changed: dict[str, Any], expected: str) -> None:
    assert line(lambda: build(onnx_path, replace(CONFIG, **changed))) == f"InputError: {expected}"
    assert not named("build")


def test_engines_for_other_gpus_of_the_same_generation_or_later(onnx_path: Path) -> None:
    for wanted in (((9, 0),), ((8, 0), (9, 0))):
        build(onnx_path, replace(CONFIG, compute_capabilities=wanted))
    assert [asked["compatibility"] for asked in named("build")] == ["NONE", "AMPERE_PLUS"]


@pytest.mark.parametrize(
    ("weak", "expected"),
    [
        (
            WeakTyping(float32=["nowhere", "norm"]),
            "the parsed network has no layer of nowhere, which must stay float32 (1 such)",
        ),
        (WeakTyping(io={"z": "float16"}), "weak typing of z as float16: expected float16, float32, int32 of x, y"),
        (WeakTyping(io={"x": "int4"}), "weak typing of x as int4: expected float16, float32, int32 of x, y"),
    ],
)
def test_weak_typing_of_what_is_not_there(onnx_path: Path, weak: WeakTyping, expected: str) -> None:
    assert line(lambda: build(onnx_path, weak=weak)) == f"InputError: {expected}"


@pytest.mark.parametrize(
    ("step", "said", "expected"),
    [
        (
            "parse",
            "In node 3 (parseGraph): UNSUPPORTED_NODE: No importer registered for op: Foo",
            "UnsupportedModelError: layers.0 can't be parsed by TensorRT 8.6.1: In node 3 (parseGraph): UNSUPPORTED_NODE: No importer registered for op: Foo",
        ),
        (
            "build",
            "10: [optimizer.cpp::computeCosts::3869] Error Code 10: Internal Error (Could not find any implementation for node down.)",
            "EngineError: layers.0 can't be built by TensorRT 8.6.1: Error Code 10: Internal Error (Could not find any implementation for node down.)",
        ),
        (
            "build",
            "2: [virtualMemoryBuffer.cpp::resizePhysical::127] Error Code 2: OutOfMemory (no further information)",
            "EngineError: layers.0 can't be built: out of memory: stop what else runs on this GPU, or lower workspace_bytes or max_tokens_per_step (Error Code 2: OutOfMemory (no further information))",
        ),
    ],
)
def test_failures_are_one_line_with_what_it_said(onnx_path: Path, step: str, said: str, expected: str) -> None:
    trt.fail[step] = said
    assert line(lambda: build(onnx_path)) == expected


def test_an_old_driver_and_none(onnx_path: Path, driver: fake_driver.FakeDriver) -> None:
    driver.answers["cuDriverGetVersion"] = 11080
    build(onnx_path)  # this TensorRT is made for such a driver
    trt.fail["builder"] = "CUDA initialization failure with error: 35"
    assert (
        line(lambda: build(onnx_path))
        == "EngineError: the NVIDIA driver of this Fake GPU runs CUDA 11.8 at most, TensorRT 8.6.1 needs a newer one: update the driver"
    )
    driver.refuse["cuInit"] = "CUDA_ERROR_NO_DEVICE"
    assert (
        line(lambda: build(onnx_path))
        == "EngineError: TensorRT 8.6.1 finds no NVIDIA GPU here: go to a machine where nvidia-smi lists one"
    )


def test_a_context_and_its_memory() -> None:
    engine = library.load(b"plan")
    context = library.context(engine)
    library.set_memory(context, 0x1000, library.memory(engine, 0))
    assert (library.memory(engine, 0), context.device_memory, library.aliased(engine)) == (4096, 0x1000, {})
    trt.fail["context"] = ""
    assert "no execution context: TensorRT 8.6.1 can't load it" in line(lambda: library.context(engine))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "1: [stdArchiveReader.cpp::StdArchiveReader::42] Error Code 1: Serialization (Serialization assertion stdVersionRead == serializationVersion failed.Version tag does not match. Note: Current Version: 236, Serialized Engine Version: 239)",
            "built by another version of TensorRT than TensorRT 8.6.1, or altered: build the engine again",
        ),
        (
            "6: The engine plan file is generated on an incompatible device, expecting compute 9.0 got compute 8.0, please rebuild.",
            "built for another GPU than this GPU (Fake GPU, 9.0): build the engine for it",
        ),
        (
            "2: [defaultAllocator.cpp::allocate::20] Error Code 1: Cuda Runtime (out of memory)",
            "too large for the free memory of this GPU (Fake GPU, 9.0): free some, or lower max_batch or max_tokens_per_step",
        ),
        (
            "1: CUDA driver version is insufficient for CUDA runtime version",
            "the NVIDIA driver of this Fake GPU runs CUDA 13.0 at most, TensorRT 8.6.1 needs a newer one: update the driver",
        ),
        ("something else", "TensorRT 8.6.1 can't load it: damaged or altered, build the engine again (something else)"),
    ],
)
def test_plans_that_do_not_fit(said: str, expected: str) -> None:
    trt.fail["load"] = said
    assert line(lambda: library.load(b"plan", "layers.0.plan")).startswith(f"EngineError: layers.0.plan: {expected}")


def test_other_weights_for_a_refittable_engine(onnx_path: Path) -> None:
    build(onnx_path, replace(CONFIG, refit=True))
    assert "REFIT" in named("build")[0]["flags"]
    engine = library.load(b"plan")
    new = {"gate_weight": np.ones((64, 128), np.float32), "up_weight": np.zeros((128, 64), np.float32).T}
    refit(library, engine, new)
    assert [(name, a.tolist()) for name, a in named("refit")[0].items()] == [(n, a.tolist()) for n, a in new.items()]
    assert (
        line(lambda: refit(library, engine, {"gate_wieght": new["gate_weight"]}))
        == "EngineError: the engine has no weight 'gate_wieght'; nearest: gate_weight, up_weight"
    )
    assert "weights that were merged are replaced together: up_weight must be given too" in line(
        lambda: refit(library, engine, {"gate_weight": new["gate_weight"]})
    )
    assert "weight up_weight of float32 (3,) doesn't fit (wrong count)" in line(
        lambda: refit(library, engine, {"up_weight": np.zeros(3, np.float32)})
    )
    trt.fail["refit"] = "no memory"
    assert line(lambda: refit(library, engine, new)) == "EngineError: TensorRT 8.6.1 can't refit the engine (no memory)"
    engine.refittable = False
    assert "the engine's weights are fixed: build it with BuildConfig(refit=True)" in line(
        lambda: refit(library, engine, new)
    )
    assert len(named("refit")) == 1


def test_engines_of_another_version() -> None:
    library.check_built_by("TensorRT 8.6.1", "engines/a")
    assert (
        line(lambda: library.check_built_by("TensorRT 10.3.0", "engines/a"))
        == "EngineError: engines/a: built by TensorRT 10.3.0, here is TensorRT 8.6.1: build the engine again, or install that one"
    )


def test_ctrl_c_waits_for_the_part_and_says_so(
    onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trt, "build_seconds", 0.5)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), PlanBuilder(library, CONFIG, total=2) as builder:
        builder.build(onnx_path, CONFIG.profiles(INPUTS), name="layers.0", weak=WEAK)
    assert "TensorRT 8.6.1 can't be stopped within a part: waiting for layers.0" in capsys.readouterr().err
    assert len(named("build")) == 1 and "llmlab-build" not in [t.name for t in threading.enumerate()]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mlp.onnx"]
