"""What can be monitored: a serving graph on the paged reference, or an engine as it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmlab.build import eos_ids
from llmlab.errors import InputError
from llmlab.quant.data import tokenizer_of
from llmlab.runtime.params import checked_integer
from llmlab.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llmlab.graph.graph import Graph
    from llmlab.runtime.batch import Backend
    from llmlab.widgets.monitor.paged import PagedReference


class Source(Protocol):
    """Something that gives backends with KV pools of any size."""

    name: str
    kind: str
    """What runs and how its KV pool is laid out, for people."""
    num_blocks: int
    """Blocks that it begins with."""
    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]

    def open(self, num_blocks: int) -> Backend:
        """A backend with an empty pool of so many blocks; the one opened before is closed."""
        ...

    def close(self) -> None: ...


class GraphSource:
    """A serving graph, run by the NumPy reference over a paged pool."""

    def __init__(self, graph: Graph, *, num_blocks: int | None, block_size: int | None) -> None:
        if not graph.kv_layers():
            raise InputError("the graph has no KV cache: give what `optimize` returned")
        self.name = str(graph.config.model_type)
        self.num_blocks = 24 if num_blocks is None else num_blocks
        self.block_size = checked_integer("block_size", 4 if block_size is None else block_size, low=1)
        self.kind = f"paged NumPy reference, blocks of {self.block_size} tokens"
        self.eos_token_ids = eos_ids(graph.config, graph.assets)
        self.tokenizer = tokenizer_of(graph) if "tokenizer.json" in graph.assets else None
        self._graph = graph
        self._backend: PagedReference | None = None

    def open(self, num_blocks: int) -> Backend:
        from llmlab.widgets.monitor.paged import PagedReference

        if self._backend is None:
            self._backend = PagedReference(self._graph, num_blocks=num_blocks, block_size=self.block_size)
        else:
            self._backend.resize(num_blocks, self.block_size)
        return self._backend

    def close(self) -> None:
        self._backend = None


class EngineSource:
    """An engine: on ONNX Runtime a block is a slot as long as the longest sequence, on TensorRT the pool is paged."""

    def __init__(self, engine: Any, *, num_blocks: int | None, threads: int | None) -> None:
        self._engine, self._threads = engine, threads
        self._slots = getattr(engine.manifest, "target", "") == "onnxruntime"
        self.name = engine.path.name
        self.num_blocks = (4 if self._slots else 64) if num_blocks is None else num_blocks
        self.kind = "ONNX Runtime, one block (a slot) a sequence" if self._slots else "paged KV pool"
        self.eos_token_ids = tuple(engine.manifest.eos_token_ids)
        self.tokenizer = Tokenizer(engine.path) if (engine.path / "tokenizer.json").is_file() else None
        self._backend: Backend | None = None

    def open(self, num_blocks: int) -> Backend:
        self.close()
        if self._slots:
            self._backend = self._engine.backend(max_num_seqs=num_blocks, threads=self._threads)
        else:
            most = min(num_blocks, self._engine.manifest.max_num_seqs)
            self._backend = self._engine.backend(max_num_seqs=most, threads=self._threads, kv_blocks=num_blocks)
        return self._backend

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()
            self._backend = None


def source_of(what: Any, *, num_blocks: int | None, block_size: int | None, threads: int | None) -> Source:
    """The source for a serving graph, an engine or the path of one. InputError for anything else."""
    if num_blocks is not None:
        num_blocks = checked_integer("kv_blocks", num_blocks, low=1)
    if isinstance(what, (str, Path)):
        from llmlab.runtime.engine import Engine

        what = Engine.load(what)
    if hasattr(what, "kv_layers"):
        if threads is not None:
            raise InputError("threads is for engines; a graph is computed by the NumPy reference")
        return GraphSource(what, num_blocks=num_blocks, block_size=block_size)
    if hasattr(what, "manifest") and hasattr(what, "backend"):
        if block_size is not None:
            raise InputError("block_size is for graphs; an engine's blocks are as it was built")
        return EngineSource(what, num_blocks=num_blocks, threads=threads)
    raise InputError(f"can't monitor a {type(what).__name__}: give a serving graph, an engine, its path, or a trace")
