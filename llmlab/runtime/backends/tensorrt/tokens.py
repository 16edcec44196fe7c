"""Sampled tokens stay on the GPU: the next step reads them there."""

from __future__ import annotations

from collections.abc import Mapping

from llmlab.cuda import Device, DeviceBuffer, Stream
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.feed import TokenFeed
from llmlab.kernels.sampling import SamplingPointers, TokenSampler
from llmlab.runtime.backends.tensorrt.buckets import StepShape
from llmlab.runtime.backends.tensorrt.staging import SAMPLING


class Tokens:
    """The tokens that the last step sampled, one for each of its rows of logits."""

    def __init__(self, kernels: KernelSet, device: Device, vocab: int, max_batch: int) -> None:
        self._sampler = TokenSampler(kernels, device, vocab)
        self._feed = TokenFeed(kernels, device)
        self._tokens = DeviceBuffer(4 * max_batch, "sampled tokens")
        self._scratch = DeviceBuffer(self._sampler.scratch_bytes(max_batch), "sampling")

    @property
    def address(self) -> int:
        """Of int32 [N]."""
        return self._tokens.pointer

    def bind(self, staged: Mapping[str, int], logits: int) -> None:
        """staged: addresses of a step's integers."""
        self._ids = staged["input_ids"]
        self._pointers = SamplingPointers(
            tokens=self.address,
            logits=logits,
            scratch=self._scratch.pointer,
            **{name: staged[name] for name in SAMPLING},
        )

    def take_previous(self, shape: StepShape, stream: Stream) -> None:
        """Put the last step's tokens where `input_ids` refers to them: -1 - j means row j."""
        self._feed.enqueue(stream, ids=self._ids, previous=self.address, count=shape.tokens)

    def sample(self, rows: int, drawn: bool, stream: Stream) -> None:
        """Choose a token for each row of the step's logits. drawn: not all of them are greedy."""
        self._sampler.enqueue(stream, self._pointers, rows=rows, drawn=drawn)

    def free(self) -> None:
        self._tokens.free()
        self._scratch.free()
