"""What the attention kernels of each layer read and write, and how their work is split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmlab.cuda import Device, DeviceBuffer, Stream
from llmlab.kernels.attention import AttentionPointers, PagedAttention, TokenLocator, scratch_bytes
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.gpu.geometry import AttentionKind, AttentionVariant, decode_splits
from llmlab.runtime.backends.tensorrt.buckets import StepShape, round_down
from llmlab.runtime.backends.tensorrt.memory import ITEM_BYTES
from llmlab.runtime.manifest import KVLayout
from llmlab.runtime.program import Attend, Program, View

Tables = Mapping[str, NDArray[np.float32]]


def variant_of(step: Attend, program: Program, kv: KVLayout, tables: Tables) -> AttentionVariant:
    """What a layer's kernels are compiled for."""
    kind = AttentionKind(
        num_heads=step.num_heads,
        kv_heads=step.kv_heads,
        head_dim=step.head_dim,
        block_size=kv.capacity,
        window=step.window,
        softcap=step.softcap,
        alibi="alibi_slopes" in step.tables,
        sinks="sinks" in step.tables,
        quantized="k_scale" in step.tables,
    )
    rotary = 2 * tables[step.tables["cos"]].shape[1] if "cos" in step.tables else 0
    return AttentionVariant(kind, program.tensors[step.out].dtype, kv.dtype, rotary, step.interleaved)


class AttentionLayers:
    """The attention between the parts of one program; `locate` comes first in every step."""

    def __init__(
        self,
        program: Program,
        kv: KVLayout,
        tables: Tables,
        kernels: KernelSet,
        device: Device,
        limits: tuple[int, int],
    ) -> None:
        """limits: most tokens and most sequences of a step. Raises EngineError where there are no kernels for this GPU."""
        self._program = program
        self._multiprocessors = device.multiprocessors
        self._locator = TokenLocator(kernels, device, kv.capacity)
        self._tables = {name: DeviceBuffer.of(array, f"the table {name}") for name, array in tables.items()}
        self._layers: dict[int, tuple[PagedAttention, AttentionPointers | None]] = {}
        made: dict[Any, PagedAttention] = {}
        for at, step in enumerate(program.steps):
            if isinstance(step, Attend):
                variant = variant_of(step, program, kv, tables)
                if (variant, step.scale) not in made:
                    made[variant, step.scale] = PagedAttention(kernels, device, variant, step.scale)
                self._layers[at] = made[variant, step.scale], None
        self.kinds: tuple[AttentionKind, ...] = tuple(dict.fromkeys(variant.kind for variant, _ in made))
        needs = [scratch_bytes(kind, *limits, device.multiprocessors) for kind in self.kinds]
        sizes = [max(sizes) for sizes in zip(*needs, strict=True)] if needs else [0, 8 * limits[0], 0, 0]
        self._scratch = [DeviceBuffer(size, "attention") for size in sizes]

    @property
    def slots(self) -> int:
        """Address of where each new token's key and value go, int64 [T]."""
        return self._scratch[1].pointer

    def bind(self, addresses: Mapping[str, int], num_blocks: int) -> None:
        """Where the step's inputs, the tensors and the pools lie."""
        self._num_blocks, self._addresses = num_blocks, addresses
        for at, (layer, _) in self._layers.items():
            step = self._program.steps[at]
            assert isinstance(step, Attend)
            self._layers[at] = layer, self._pointers(step)

    def splits(self, batch: int, longest: int) -> tuple[int, ...]:
        """For each kind of layer, of a step of `batch` sequences whose decoding ones have up to `longest` keys (0: none does)."""
        if not longest:
            return (0,) * len(self.kinds)
        return tuple(round_down(decode_splits(kind, batch, longest, self._multiprocessors)) for kind in self.kinds)

    def locate(self, shape: StepShape, stream: Stream) -> None:
        self._locator.enqueue(
            stream,
            slots=self.slots,
            query_start=self._addresses["query_start"],
            kv_len=self._addresses["kv_len"],
            block_table=self._addresses["block_table"],
            tokens=shape.tokens,
            batch=shape.batch,
            table_stride=shape.table_width,
        )

    def enqueue(self, at: int, shape: StepShape, stream: Stream) -> None:
        """Attention of the program's step number `at`."""
        layer, pointers = self._layers[at]
        assert pointers is not None
        layer.enqueue(
            stream,
            pointers,
            tokens=shape.tokens,
            batch=shape.batch,
            decode=shape.decode,
            splits=shape.splits[self.kinds.index(layer.variant.kind)],
            table_stride=shape.table_width,
            blocks=self._num_blocks,
        )

    def free(self) -> None:
        for buffer in (*self._scratch, *self._tables.values()):
            buffer.free()

    def _pointers(self, step: Attend) -> AttentionPointers:
        at = self._addresses
        tensors = self._program.tensors

        def place(view: View) -> int:
            return at[view.tensor] + view.offset * ITEM_BYTES[tensors[view.tensor].dtype]

        return AttentionPointers(
            q=place(step.q),
            k=place(step.k),
            v=place(step.v),
            q_stride=tensors[step.q.tensor].width,
            k_stride=tensors[step.k.tensor].width,
            v_stride=tensors[step.v.tensor].width,
            q_scratch=self._scratch[0].pointer,
            out=at[step.out],
            pool=at[f"kv_cache.{step.layer}"],
            query_start=at["query_start"],
            kv_len=at["kv_len"],
            block_table=at["block_table"],
            position_ids=at["position_ids"],
            slots=self.slots,
            partial=self._scratch[2].pointer,
            partial_lse=self._scratch[3].pointer,
            **{what: self._tables[name].pointer for what, name in step.tables.items()},
        )
