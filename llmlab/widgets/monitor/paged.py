"""A serving graph as a backend with a paged KV pool, computed by the NumPy reference: slow, exact, for any block size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmlab.graph.interpret import Interpreter
from llmlab.runtime.batch import EngineLimits, StepBatch

if TYPE_CHECKING:
    from llmlab.graph.graph import Graph

_INPUTS = ("input_ids", "position_ids", "query_start", "kv_len", "block_table", "logits_index")


class PagedReference:
    """Implements `Backend`. Blocks that were released hold NaN, so that a wrong read would be seen."""

    def __init__(self, graph: Graph, *, num_blocks: int, block_size: int) -> None:
        self._interpreter = Interpreter(graph, num_blocks, block_size)
        self._config = graph.config
        self.resize(num_blocks, block_size)

    def resize(self, num_blocks: int, block_size: int) -> None:
        """Begin again with a pool of this size."""
        longest = min(self._config.max_position_embeddings, num_blocks * block_size + 1)
        self._interpreter.reset(num_blocks, block_size)
        self.limits = EngineLimits(
            vocab_size=self._config.vocab_size,
            max_seq_len=longest,
            max_tokens_per_step=max(longest, 512),
            num_blocks=num_blocks,
            block_size=block_size,
        )

    def execute(self, batch: StepBatch) -> NDArray[np.float32]:
        for copy in batch.copies:
            for cache in self._interpreter.caches.values():
                cache[:, copy.dst, :, : copy.num_tokens] = cache[:, copy.src, :, : copy.num_tokens]
        return self._interpreter.step({name: getattr(batch, name) for name in _INPUTS})

    def release(self, blocks: Sequence[int]) -> None:
        for cache in self._interpreter.caches.values():
            if cache.dtype.kind == "f":
                cache[:, list(blocks)] = np.nan

    def close(self) -> None: ...
