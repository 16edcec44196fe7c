"""Plans built from ONNX files by TensorRT-RTX, which needs no GPU for that."""

from __future__ import annotations

from pathlib import Path

import pytest
import trt_graphs

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("polygraphy")

from llmlab.errors import InputError
from llmlab.tensorrt.builder import Plan, PlanBuilder, build_plan
from llmlab.tensorrt.config import BuildConfig
from llmlab.tensorrt.library import Library, resolve

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
