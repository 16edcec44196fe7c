"""What the plugin hands to the kernels, against a stand-in for the driver: addresses, strides, sizes, order, stream."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from fake_driver import FakeDriver, installed

from llmlab.cuda import Device
from llmlab.errors import EngineError
from llmlab.kernels.binaries import Kernel, KernelSet
from llmlab.tensorrt.attention_launch import workspace_bytes
from llmlab.tensorrt.attention_node import AttentionNode, Shape
from llmlab.tensorrt.library import resolve
from llmlab.tensorrt.plugin import plugin_fields, plugin_host

pytest.importorskip("tensorrt_rtx")

trt = resolve("tensorrt-rtx").module

STREAM, WORKSPACE = 0x5A, 1 << 40
POINTERS = (
    *("q", "k", "v", "q_out", "out", "pool", "partial", "partial_lse", "query_start", "kv_len", "block_table"),
    *("position_ids", "slots", "cos", "sin", "alibi_slopes", "sinks", "k_scale", "v_scale"),
)
NUMBERS = ("q_stride", "k_stride", "v_stride", "pool_half", "table_stride", "splits", "num_seqs")
PARAMETERS = (*((name, "ptr") for name in POINTERS), *((name, "i64") for name in NUMBERS), ("scale", "fp32"))
NODE = AttentionNode(8, 2, 32, 16, 0.25, rotary=32, packed=1)


class EveryKernel(KernelSet):
    """A kernel for whatever is asked, which takes every parameter there is."""

    def __init__(self) -> None:
        super().__init__([])
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def find(self, name: str, constants: Mapping[str, Any], compute_capability: tuple[int, int]) -> Kernel:
        self.asked.append((name, dict(constants)))
        label = f"{name}.{constants.get('SPLIT', constants.get('ROWS', ''))}"
        return Kernel(label, constants, 90, PARAMETERS, 4, 0, True, label.encode())


@pytest.fixture
def fake() -> Iterator[FakeDriver]:
    fake = FakeDriver()
    fake.__dict__["parameters"] = SimpleNamespace(get=lambda kernel, default: len(PARAMETERS) + 2)
    with installed(fake) as driver:
        yield driver


def shapes(node: AttentionNode, tokens: int, batch: int, width: int) -> list[Shape]:
    """Of the node's inputs, for `tokens` rows of `batch` sequences with `width` blocks each, over a pool of 100 blocks."""
    kv = node.kv_num_heads * node.head_dim
    known: dict[str, Shape] = {
        "qkv": (tokens, node.width + 2 * kv),
        "q": (tokens, node.width),
        "k": (tokens, kv),
        "v": (tokens, kv),
        "pool": (2, 100, node.kv_num_heads, node.block_size, node.head_dim),
        "query_start": (batch + 1,),
        "kv_len": (batch,),
        "block_table": (batch, width),
        **dict.fromkeys(("position_ids", "slots"), (tokens,)),
        **dict.fromkeys(("cos", "sin"), (64, node.rotary // 2)),
        **dict.fromkeys(("alibi_slopes", "sinks"), (node.num_heads,)),
        **dict.fromkeys(("k_scale", "v_scale"), (node.kv_num_heads,)),
    }
    return [known[name] for name in node.inputs]


def plugin_of(node: AttentionNode, kernels: KernelSet) -> Any:
    """The plugin as an engine makes it when it is opened."""
    given, _kept = plugin_fields(trt, asdict(node))
    host = plugin_host(trt)
    with host.launching(kernels, Device.open(0)):
        plugin = host.creator.create_plugin("x", given, trt.TensorRTPhase.RUNTIME)
    return plugin.attach_to_context(None)


def addresses(node: AttentionNode) -> dict[str, int]:
    return {name: (i + 1) << 32 for i, name in enumerate(node.inputs)}


def step(
    fake: FakeDriver,
    node: AttentionNode,
    tokens: int,
    batch: int,
    width: int,
    pool: str = "float16",
    kernels: KernelSet | None = None,
) -> list[tuple[str, tuple[int, ...], dict[str, float]]]:
    """One execution. Of each launch: the kernel, its grid and its arguments by name."""
    plugin = plugin_of(node, kernels or EveryKernel())
    types = {"pool": {"float16": trt.float16, "int8": trt.int8}[pool]}
    inputs = [
        SimpleNamespace(dims=trt.Dims(shape), type=types.get(name, trt.float16))
        for name, shape in zip(node.inputs, shapes(node, tokens, batch, width), strict=True)
    ]
    plugin.on_shape_change([SimpleNamespace(type=t.type) for t in inputs], [])
    fake.launches.clear()
    plugin.enqueue(inputs, [], list(addresses(node).values()), [7 << 50, addresses(node)["pool"]], WORKSPACE, STREAM)
    found = []
    for launch in fake.launches:
        assert launch.stream == STREAM
        words = dict(zip((name for name, _ in PARAMETERS), launch.words, strict=False))
        values: dict[str, float] = {
            name: struct.unpack_from("<f" if kind == "fp32" else "<q", words[name])[0] for name, kind in PARAMETERS
        }
        found.append((launch.kernel, launch.grid, values))
    return found


def test_a_decode_step_of_packed_rows(fake: FakeDriver) -> None:
    launches = step(fake, NODE, tokens=4, batch=4, width=64)
    # 1,024 keys at most, 132 multiprocessors: four splits of 256 keys.
    assert [(kernel, grid) for kernel, grid, _ in launches] == [
        ("rope_and_write.", (4, 2, 1)),
        ("paged_decode.True", (4, 2, 4)),
        ("merge_splits.", (4, 8, 1)),
    ]
    at, (_, _, write) = addresses(NODE), launches[0]
    assert (write["q"], write["k"], write["v"]) == (at["qkv"], at["qkv"] + 2 * 256, at["qkv"] + 2 * (256 + 64))
    assert (write["q_stride"], write["k_stride"], write["v_stride"]) == (384, 384, 384)
    _, _, attend = launches[1]
    assert attend["q"] == write["q_out"] and attend["q_stride"] == 256
    for values in (write, attend):
        assert {name: values[name] for name in at if name != "qkv"} == {k: v for k, v in at.items() if k != "qkv"}
        assert (values["out"], values["scale"]) == (7 << 50, 0.25)
        assert (values["table_stride"], values["splits"], values["num_seqs"]) == (64, 4, 4)
        assert values["pool_half"] == 100 * 2 * 16 * 32


def test_a_step_with_prompts_and_rows_apart(fake: FakeDriver) -> None:
    node = replace(NODE, packed=0, rotary=0, alibi=1, sinks=1)
    launches = step(fake, node, tokens=300, batch=3, width=8)
    # 128 keys at most: one split. Decodes among the prompts are done by the decode kernel.
    assert [kernel for kernel, _, _ in launches] == ["rope_and_write.", "paged_prefill.128", "paged_decode.False"]
    at, (_, grid, write) = addresses(node), launches[0]
    assert grid == (300, 2, 1)
    assert {name: write[name] for name in at} == at
    assert (write["q_stride"], write["k_stride"], write["v_stride"]) == (256, 64, 64)
    assert (write["cos"], write["sin"], write["k_scale"]) == (0, 0, 0)


def test_one_sequence_of_one_token_is_a_decode(fake: FakeDriver) -> None:
    assert [kernel for kernel, _, _ in step(fake, NODE, 1, 1, 1)] == ["rope_and_write.", "paged_decode.False"]


def test_scratch_memory_is_cut_into_parts_that_fit(fake: FakeDriver) -> None:
    for tokens, batch, width in ((1, 1, 512), (4, 4, 64), (300, 3, 8), (64, 64, 512)):
        (_, _, values), *_ = step(fake, NODE, tokens, batch, width)
        splits = int(values["splits"])
        parts = sorted(
            [
                (int(values["q_out"]), 2 * tokens * 256),
                (int(values["partial"]), 4 * batch * 8 * splits * 32 * (splits > 1)),
                (int(values["partial_lse"]), 4 * batch * 8 * splits * (splits > 1)),
            ]
        )
        for (start, size), (following, _) in pairwise([*parts, (WORKSPACE + workspace_bytes(NODE, tokens, batch), 0)]):
            assert start + size <= following
            assert start % 256 == 0
        # A context gets memory for the largest step, and smaller ones have to fit as well.
        assert workspace_bytes(NODE, tokens, batch) <= workspace_bytes(NODE, 300, 64)


def test_an_int8_pool_has_scales_and_kernels_of_its_own(fake: FakeDriver) -> None:
    node, kernels = replace(NODE, quantized=1), EveryKernel()
    (_, _, values), *_ = step(fake, node, 4, 4, 8, pool="int8", kernels=kernels)
    at = addresses(node)
    assert (values["k_scale"], values["v_scale"]) == (at["k_scale"], at["v_scale"])
    assert {c["KV_DTYPE"] for _, c in kernels.asked} == {"int8"} and all(
        c["DTYPE"] == "float16" for _, c in kernels.asked
    )


def test_kernels_are_loaded_once_and_not_while_it_runs(fake: FakeDriver) -> None:
    plugin = plugin_of(NODE, EveryKernel())
    inputs = [SimpleNamespace(dims=shape, type=trt.float16) for shape in shapes(NODE, 2, 2, 4)]
    plugin.on_shape_change(inputs, [])
    plugin.on_shape_change(inputs, [])
    loaded = len(fake.named("cuModuleLoadData"))
    fake.calls.clear()
    plugin.enqueue(inputs, [], list(addresses(NODE).values()), [0, 0], WORKSPACE, STREAM)
    assert loaded == 6
    assert {name for name, _ in fake.calls} == {"cuLaunchKernel"}, "a capture allows nothing else"


def test_an_execution_that_no_shapes_were_named_for_loads_its_kernels(fake: FakeDriver) -> None:
    plugin = plugin_of(NODE, EveryKernel())
    inputs = [SimpleNamespace(dims=shape, type=trt.float16) for shape in shapes(NODE, 2, 2, 4)]
    plugin.enqueue(inputs, [], list(addresses(NODE).values()), [0, 0], WORKSPACE, STREAM)
    assert len(fake.launches) == 2


def test_what_the_driver_refuses_is_an_error_of_the_step(fake: FakeDriver) -> None:
    fake.refuse["cuLaunchKernel"] = "CUDA_ERROR_INVALID_VALUE"
    with pytest.raises(EngineError, match="CUDA_ERROR_INVALID_VALUE"), plugin_host(trt).reporting():
        step(fake, NODE, 2, 2, 4)


def test_a_plugin_that_is_being_built_launches_nothing(fake: FakeDriver) -> None:
    given, _kept = plugin_fields(trt, asdict(NODE))
    plugin = plugin_host(trt).creator.create_plugin("x", given, trt.TensorRTPhase.BUILD)
    plugin.on_shape_change([], [])
    plugin.enqueue([], [], [], [], 0, STREAM)
    assert not fake.calls
