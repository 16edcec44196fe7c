"""Where a program's tensors and the KV pool lie in GPU memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmlab.cuda import Device, DeviceBuffer
from llmlab.errors import EngineError, InputError
from llmlab.runtime.manifest import KVLayout
from llmlab.runtime.program import Attend, Multiply, Normalize, Program, Step, TensorSpec

ALIGN = 256
"""Bytes; what TensorRT asks of an address, and more than the kernels do."""
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "int32": 4, "int64": 8, "int8": 1, "float8_e4m3fn": 1}
DEFAULT_FRACTION = 0.9
MOST_BLOCKS = 1 << 24
"""Of a KV pool; the host keeps books about each."""

Span = tuple[int, int]
"""First and last step, both included."""


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def tensor_bytes(spec: TensorSpec, tokens: int, rows: int) -> int:
    return (tokens if spec.rows == "T" else rows) * max(1, spec.width) * ITEM_BYTES[spec.dtype]


def touched(step: Step) -> tuple[list[str], list[str]]:
    """Names of the tensors that a step reads, and of those that it makes."""
    if isinstance(step, Attend):
        return [step.q.tensor, step.k.tensor, step.v.tensor], [step.out]
    if isinstance(step, Multiply):
        return [step.x.tensor, *([] if step.add is None else [step.add])], [step.out]
    if isinstance(step, Normalize):
        return [step.x.tensor], [step.out]
    return list(step.inputs.values()), list(step.outputs.values())


def lifetimes(program: Program) -> dict[str, Span]:
    """From the step that makes a tensor to the last one that reads it; `logits` outlive all. EngineError for a program that
    reads what nothing made, or makes something twice: it was altered."""
    spans: dict[str, Span] = {}
    for at, step in enumerate(program.steps):
        read, made = touched(step)
        for name in (n for n in read if n in program.tensors):
            if name not in spans:
                raise EngineError(f"the program reads {name} in step {at} ({step.name}) before anything made it")
            spans[name] = (spans[name][0], at)
        for name in (n for n in made if n in program.tensors):
            if name in spans:
                raise EngineError(f"the program makes {name} a second time in step {at} ({step.name})")
            spans[name] = (at, at)
    if "logits" not in spans:
        raise EngineError("the program makes no logits")
    spans["logits"] = (spans["logits"][0], len(program.steps))
    return spans


def place(sizes: Mapping[str, int], spans: Mapping[str, Span]) -> tuple[dict[str, int], int]:
    """Offsets of tensors in one buffer, and its size in bytes: no two that live in the same step overlap.

    Largest first, each at the lowest place that is free for as long as it lives (Pisarchyk and Lee 2020, greedy by size).
    """
    offsets: dict[str, int] = {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], spans[n], n)):
        first, last = spans[name]
        others = sorted(
            (offsets[o], offsets[o] + aligned(sizes[o]))
            for o in offsets
            if spans[o][0] <= last and first <= spans[o][1]
        )
        at = 0
        for low, high in others:
            if at + aligned(sizes[name]) <= low:
                break
            at = max(at, high)
        offsets[name] = at
    return offsets, max((offsets[n] + aligned(sizes[n]) for n in offsets), default=0)


@dataclass(frozen=True)
class Activations:
    """One buffer for all that a step's parts hand each other."""

    buffer: DeviceBuffer
    addresses: Mapping[str, int]

    @classmethod
    def allocate(cls, program: Program, tokens: int, rows: int) -> Activations:
        """For steps of up to `tokens` new tokens and `rows` rows of logits."""
        spans = lifetimes(program)
        sizes = {name: tensor_bytes(program.tensors[name], tokens, rows) for name in spans}
        offsets, total = place(sizes, spans)
        buffer = DeviceBuffer(total, "activations")
        return cls(buffer, {name: buffer.pointer + offset for name, offset in offsets.items()})


class KVPool:
    """The KV blocks of all layers: each layer's lie together as [2, blocks, kv_heads, block_size, head_dim]."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = layout.capacity
        self._item = ITEM_BYTES[layout.dtype]
        self._layers = layout.layers
        sizes = [2 * num_blocks * self._block_bytes(layer) for layer in layout.layers]
        self._buffer = DeviceBuffer(
            sum(map(aligned, sizes)), f"a KV pool of {num_blocks} blocks of {self.block_size} tokens"
        )
        self.addresses: list[int] = []
        at = self._buffer.pointer
        for size in sizes:
            self.addresses.append(at)
            at += aligned(size)

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def spans(self, block: int, num_tokens: int) -> list[tuple[int, int]]:
        """Address and size of all that holds the first `num_tokens` tokens of `block`, in every layer."""
        found = []
        for address, (heads, dim) in zip(self.addresses, self._layers, strict=True):
            head = self.block_size * dim * self._item
            for half in range(2):
                at = address + (half * self.num_blocks + block) * heads * head
                if num_tokens == self.block_size:
                    found.append((at, heads * head))
                else:
                    found += [(at + h * head, num_tokens * dim * self._item) for h in range(heads)]
        return found

    def free(self) -> None:
        self._buffer.free()

    def _block_bytes(self, layer: tuple[int, int]) -> int:
        return layer[0] * layer[1] * self.block_size * self._item


def block_bytes(layout: KVLayout) -> int:
    """Bytes of one block over all layers."""
    return sum(2 * heads * dim for heads, dim in layout.layers) * layout.capacity * ITEM_BYTES[layout.dtype]


def pool_blocks(
    layout: KVLayout,
    device: Device,
    wanted: int,
    most: int = MOST_BLOCKS,
    *,
    kv_blocks: int | None,
    kv_memory_fraction: float | None,
) -> int:
    """How many blocks the pool gets. wanted: the default, where memory allows; most: what the engine takes. Raises InputError for sizes that are none or
    don't fit, EngineError where not even one block fits."""
    if kv_blocks is not None and kv_memory_fraction is not None:
        raise InputError("kv_blocks and kv_memory_fraction are both given, expected one of them")
    whole = isinstance(kv_blocks, int) and not isinstance(kv_blocks, bool)
    if kv_blocks is not None and not (whole and 1 <= kv_blocks <= most):
        raise InputError(f"kv_blocks is {kv_blocks!r}, expected an integer from 1 to {most}")
    fraction = DEFAULT_FRACTION if kv_memory_fraction is None else kv_memory_fraction
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise InputError(f"kv_memory_fraction is {fraction!r}, expected a number above 0, at most 1")
    free, one = device.free_memory, block_bytes(layout)
    if kv_blocks is not None:
        if kv_blocks * one > free:
            raise EngineError(
                f"out of GPU memory: {kv_blocks} KV blocks take {kv_blocks * one / 1e9:.2f} GB and {free / 1e9:.2f} GB are "
                f"free: lower kv_blocks to {free // one} or less"
            )
        return kv_blocks
    fitting = min(int(free * fraction) // one, most)
    if fitting < 1:
        raise EngineError(
            f"out of GPU memory: one KV block takes {one / 1e9:.3f} GB and {fraction:.0%} of {free / 1e9:.2f} GB free are "
            "there for them: raise kv_memory_fraction, or stop what else runs on this GPU"
        )
    return fitting if kv_memory_fraction is not None else min(fitting, wanted)
