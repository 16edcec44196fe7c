"""From what TensorRT hands a plugin (shapes, addresses, scratch memory, a stream) to the launch of a layer's kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmlab.cuda import Device
from llmlab.kernels.attention import AttentionPointers, PagedAttention, scratch_bytes
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.gpu.geometry import AttentionVariant, decode_splits
from llmlab.tensorrt.attention_node import AttentionNode, Shape

MULTIPROCESSORS = 256
"""No GPU has more. An engine is built for GPUs that aren't there, and scratch memory for split keys grows with these."""

_ALIGN = 256  # bytes


def workspace_bytes(node: AttentionNode, tokens: int, batch: int) -> int:
    """Scratch memory of one layer for steps of up to `tokens` rows and `batch` sequences."""
    return sum(_rounded(size) for size in _scratch(node, tokens, batch).values())


def _scratch(node: AttentionNode, tokens: int, batch: int) -> dict[str, int]:
    need = scratch_bytes(node.kind, tokens, batch, MULTIPROCESSORS)
    return {"q_scratch": need.q, "partial": need.partial, "partial_lse": need.partial_lse}


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


class AttentionLaunch:
    """One layer on one GPU. How it is cut into programs depends on shapes alone, so that a CUDA graph of it stays right."""

    def __init__(self, node: AttentionNode, kernels: KernelSet, device: Device, types: Sequence[str]) -> None:
        """types: of the node's inputs. Raises EngineError where `kernels` has none for this layer on this GPU."""
        self._node, self._device = node, device
        variant = AttentionVariant(node.kind, types[0], types[node.pool], node.rotary, bool(node.interleaved))
        self._layer = PagedAttention(kernels, device, variant, node.scale)

    def enqueue(
        self,
        shapes: Sequence[Shape],
        inputs: Sequence[int],
        out: int,
        workspace: int,
        stream: int,
    ) -> None:
        """shapes, inputs: of the node's inputs, in order. A step with as many rows as sequences is one of decodes alone."""
        node = self._node
        shape = dict(zip(node.inputs, shapes, strict=True))
        tokens, (batch, blocks_a_sequence) = shape["position_ids"][0], shape["block_table"]
        longest = blocks_a_sequence * node.block_size
        self._layer.enqueue(
            stream,
            _pointers(node, dict(zip(node.inputs, inputs, strict=True)), out, workspace, tokens, batch),
            tokens=tokens,
            batch=batch,
            decode=tokens == batch,
            splits=decode_splits(node.kind, batch, longest, min(self._device.multiprocessors, MULTIPROCESSORS)),
            table_stride=blocks_a_sequence,
            blocks=shape["pool"][1],
        )


def _pointers(
    node: AttentionNode, given: Mapping[str, int], out: int, workspace: int, tokens: int, batch: int
) -> AttentionPointers:
    """Addresses by name: q, k and v may be columns of one tensor, and scratch memory is cut into its parts."""
    named: dict[str, Any] = dict(given)
    kv = node.kv_num_heads * node.head_dim
    if node.packed:
        qkv, itemsize, width = named.pop("qkv"), 2, node.width + 2 * kv
        named |= {"q": qkv, "k": qkv + itemsize * node.width, "v": qkv + itemsize * (node.width + kv)}
        named |= dict.fromkeys(("q_stride", "k_stride", "v_stride"), width)
    else:
        named |= {"q_stride": node.width, "k_stride": kv, "v_stride": kv}
    for name, size in _scratch(node, tokens, batch).items():
        named[name] = workspace
        workspace += _rounded(size)
    return AttentionPointers(out=out, **named)
