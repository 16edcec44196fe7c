"""The plugin's `enqueue` computes what PagedAttention's definition says: its launches run by Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_driver import installed

pytest.importorskip("tensorrt_rtx")
os.environ.setdefault("TRITON_INTERPRET", "1")

from emulated_gpu import EmulatedGpu

from llmlab.cuda import Device, DeviceBuffer, Stream
from llmlab.kernels.attention import TokenLocator
from llmlab.kernels.compile import attention_sources
from llmlab.kernels.gpu.geometry import AttentionVariant
from llmlab.kernels.reference import paged_attention
from llmlab.tensorrt.attention_launch import workspace_bytes
from llmlab.tensorrt.attention_node import AttentionNode
from llmlab.tensorrt.library import resolve
from llmlab.tensorrt.plugin import plugin_fields, plugin_host

trt = resolve("tensorrt-rtx").module
NODE = AttentionNode(4, 2, 32, 16, 0.2, window=20, rotary=32, packed=1)
INT8 = replace(NODE, quantized=1)
SCALES = {"k_scale": np.array([0.03, 0.02], np.float32), "v_scale": np.array([0.02, 0.03], np.float32)}
BLOCKS, WIDTH, TOLERANCE = 8, 2, 2e-3
_TYPES = {"float16": trt.float16, "float32": trt.float32, "int32": trt.int32, "int64": trt.int64, "int8": trt.int8}
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def gpu() -> Iterator[EmulatedGpu]:
    wide, narrow = AttentionVariant(NODE.kind, rotary=32), AttentionVariant(INT8.kind, kv_dtype="int8", rotary=32)
    with installed(EmulatedGpu([*attention_sources(wide), *attention_sources(narrow)])) as emulated:
        yield emulated  # type: ignore[misc]


def step(node: AttentionNode, new: list[int], past: list[int]) -> Arrays:
    """The plugin's inputs, for sequences of `new` tokens behind `past` ones in a pool of random numbers."""
    random = np.random.default_rng(sum(new))
    rows, kv = sum(new), NODE.kv_num_heads * NODE.head_dim
    angles = np.outer(np.arange(64), 0.8 ** np.arange(NODE.rotary // 2))
    pool = random.standard_normal((2, BLOCKS, NODE.kv_num_heads, NODE.block_size, NODE.head_dim))
    return {
        "qkv": random.standard_normal((rows, NODE.width + 2 * kv)).astype(np.float16),
        "pool": (40 * pool).clip(-127, 127).astype(np.int8) if node.quantized else pool.astype(np.float16),
        "query_start": np.cumsum([0, *new], dtype=np.int32),
        "kv_len": np.array([n + p for n, p in zip(new, past, strict=True)], np.int32),
        "block_table": random.permutation(BLOCKS)[: WIDTH * len(new)].reshape(-1, WIDTH).astype(np.int32),
        "position_ids": np.concatenate([p + np.arange(n) for n, p in zip(new, past, strict=True)]).astype(np.int32),
        "slots": np.full(rows, 1 << 40, np.int64),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        **(SCALES if node.quantized else {}),
    }


def expected(given: Arrays) -> tuple[np.ndarray, np.ndarray]:
    kv = NODE.kv_num_heads * NODE.head_dim
    q, k, v = np.split(given["qkv"], [NODE.width, NODE.width + kv], axis=1)
    out, pool = paged_attention(
        *(q, k, v, given["pool"]),
        *(given[name] for name in ("query_start", "kv_len", "block_table")),
        given["position_ids"].astype(np.int64),
        given["cos"],
        given["sin"],
        k_scale=given.get("k_scale"),
        v_scale=given.get("v_scale"),
        num_heads=NODE.num_heads,
        kv_num_heads=NODE.kv_num_heads,
        head_dim=NODE.head_dim,
        scale=NODE.scale,
        window=NODE.window,
    )
    return out, pool


def enqueued(gpu: EmulatedGpu, node: AttentionNode, given: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """What the plugin leaves in its output and in the pool; its scratch memory is no larger than it asked for."""
    device, stream = Device.open(0), Stream()
    fields, _kept = plugin_fields(trt, asdict(node))
    host = plugin_host(trt)
    with host.reporting(), host.launching(gpu.kernels, device):
        plugin = host.creator.create_plugin("x", fields, trt.TensorRTPhase.RUNTIME).attach_to_context(None)
    tokens, batch = len(given["qkv"]), len(given["kv_len"])
    buffers = {name: DeviceBuffer.of(given[name]) for name in node.inputs}
    out, scratch = DeviceBuffer(2 * tokens * NODE.width), DeviceBuffer(workspace_bytes(node, tokens, batch))
    for poisoned in (out, scratch):
        poisoned.fill_byte(0xFF, stream)
    TokenLocator(gpu.kernels, device, NODE.block_size).enqueue(
        stream,
        **{name: buffers[name].pointer for name in ("slots", "query_start", "kv_len", "block_table")},
        tokens=tokens,
        batch=batch,
        table_stride=WIDTH,
    )
    described: list[Any] = [
        SimpleNamespace(dims=trt.Dims(given[n].shape), type=_TYPES[given[n].dtype.name]) for n in node.inputs
    ]
    pointers = [buffers[name].pointer for name in node.inputs]
    with host.reporting():
        plugin.on_shape_change(described, [])
        plugin.enqueue(described, [], pointers, [out.pointer, buffers["pool"].pointer], scratch.pointer, stream.handle)
    stream.synchronize()
    return out.to_numpy(np.float16, (tokens, NODE.width)), buffers["pool"].to_numpy(
        given["pool"].dtype.type, given["pool"].shape
    )


def error(found: np.ndarray, truth: np.ndarray) -> float:
    """Of the worst row; infinite where there is no number."""
    found, truth = (x.reshape(len(x), -1).astype(np.float64) for x in (found, truth))
    worst = float((np.linalg.norm(found - truth, axis=1) / np.linalg.norm(truth, axis=1)).max())
    return worst if np.isfinite(worst) else float("inf")


# A chunk, a decode, a prompt of one block; then a step of decodes alone.
STEPS = {"mixed": ([5, 1, 16], [7, 21, 0]), "decodes": ([1, 1, 1], [24, 0, 9])}


@pytest.mark.parametrize(
    ("which", "node"), [("mixed", NODE), ("decodes", NODE), ("mixed", INT8)], ids=["mixed", "decodes", "int8 pool"]
)
def test_it_computes_what_the_definition_says(gpu: EmulatedGpu, which: str, node: AttentionNode) -> None:
    given = step(node, *STEPS[which])
    (out, pool), (true_out, true_pool) = enqueued(gpu, node, given), expected(given)
    assert error(out, true_out) < TOLERANCE
    assert error(pool, true_pool) < TOLERANCE
    # What a packed row's columns, a position or a block would change is far more than that.
    q, k, v = (slice(a, b) for a, b in ((0, 128), (128, 192), (192, 256)))
    swapped = given["qkv"].copy()
    swapped[:, k], swapped[:, v] = given["qkv"][:, v], given["qkv"][:, k]
    turned = np.roll(given["qkv"][:, q], 32, axis=1)
    for other in (
        {"qkv": swapped},
        {"qkv": np.concatenate([turned, given["qkv"][:, 128:]], 1)},
        {"position_ids": np.maximum(given["position_ids"] - 1, 0)},
        {"block_table": np.roll(given["block_table"], 1, axis=0)},
    ):
        assert error(out, expected(given | other)[0]) > 20 * TOLERANCE
