"""Runs a serving graph on ONNX Runtime over calibration data, with inner tensors looked at as they come by."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmlab.errors import InputError, nearest
from llmlab.graph.edit import Editor
from llmlab.graph.graph import Graph
from llmlab.graph.lower.onnxruntime import lower
from llmlab.graph.store.storage import MODEL, write_onnx
from llmlab.progress import make_bar
from llmlab.quant.data import Ids
from llmlab.quant.observers import Observer

BATCH_TOKENS = 2048
"""Tokens of the samples that run together."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Batch:
    """Whole samples that run together, their tokens laid end to end. first: place of the first one in the data."""

    samples: Sequence[Ids]
    first: int

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.samples]

    def feeds(self) -> Arrays:
        """Inputs of a lowered graph, all but the slots; logits are wanted of every token."""
        lengths, longest = np.array(self.lengths), max(self.lengths)
        starts = np.cumsum(lengths) - lengths
        offset = np.arange(longest)
        return {
            "input_ids": np.concatenate(list(self.samples)),
            "position_ids": np.concatenate([np.arange(n) for n in lengths]),
            "logits_index": np.arange(lengths.sum()),
            "unpack_index": np.where(offset < lengths[:, None], starts[:, None] + offset, 0),
            "pack_index": np.concatenate([row * longest + np.arange(n) for row, n in enumerate(lengths)]),
            "seqlens_k": (lengths - 1).astype(np.int32),
            "query_seqlens": lengths.astype(np.int32),
        }

    def place(self, row: int) -> tuple[int, int]:
        """(sample in the data, token) of a row."""
        ends = np.cumsum(self.lengths)
        sample = int(np.searchsorted(ends, row, side="right"))
        return self.first + sample, row - int(ends[sample] - self.lengths[sample])


def batches(data: Sequence[Ids], tokens: int = BATCH_TOKENS) -> list[Batch]:
    """The data in order, as many samples together as have no more than `tokens` tokens (one, if it has more)."""
    made: list[Batch] = []
    first, size = 0, 0
    for place, ids in enumerate(data):
        if place > first and size + len(ids) > tokens:
            made.append(Batch(data[first:place], first))
            first, size = place, 0
        size += len(ids)
    return [*made, Batch(data[first:], first)]


def check_data(graph: Graph, data: Sequence[Ids]) -> None:
    """Raises InputError where the graph is none that can be run, the data is empty, or no data for it."""
    if graph.kind != "serving":
        raise InputError("calibration runs a serving graph: optimize the graph first")
    kinds = {np.dtype(n.outputs[0].dtype).name for n in graph.surgeon.nodes if n.op == "PagedAttention"}
    if kinds - {"float32"}:
        raise InputError(
            f"calibration runs in float32, and this graph is in {', '.join(sorted(kinds))}: start from the graph that llmlab.optimize "
            "returned, with precision in the recipe"
        )
    if not data or not all(len(ids) for ids in data):
        raise InputError("the calibration set is empty, or has an empty sample: give texts, chats or token ids")
    vocab, longest = graph.config.vocab_size, graph.config.max_position_embeddings
    for place, ids in enumerate(data):
        if int(ids.max()) >= vocab:
            raise InputError(
                f"calibration sample {place} has the token id {int(ids.max())}; the model has {vocab} tokens"
            )
        if len(ids) > longest:
            raise InputError(f"calibration sample {place} has {len(ids)} tokens; the model takes at most {longest}")


class Runner:
    """A serving graph, or a piece of one, that is open in ONNX Runtime.

    capacity: the longest sample. threads: of ONNX Runtime (default: one a physical core).
    """

    def __init__(self, graph: Graph, capacity: int, threads: int | None = None) -> None:
        import onnxruntime as ort

        lowered = lower(graph, capacity)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False  # it would keep the most that any batch took
        options.intra_op_num_threads = threads or 0
        with tempfile.TemporaryDirectory(prefix="llmlab-calibration-") as folder:
            write_onnx(lowered.surgeon, Path(folder))
            self._session = ort.InferenceSession(str(Path(folder) / MODEL), options, ["CPUExecutionProvider"])
        self._inputs = [i.name for i in self._session.get_inputs()]
        self._slots = {t.name: t for t in lowered.surgeon.inputs if t.name.startswith(("past_key.", "past_value."))}

    def run(
        self, batch: Batch, outputs: Sequence[str], given: Mapping[str, np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """The named outputs; `given`: what the piece reads of others."""
        feeds = {**batch.feeds(), **(given or {})}
        for name, slot in self._slots.items():
            feeds[name] = np.zeros((len(batch.samples), *slot.shape[1:]), slot.dtype)
        found: list[np.ndarray] = self._session.run(list(outputs), {name: feeds[name] for name in self._inputs})
        return found


def observe(
    graph: Graph,
    data: Sequence[Ids],
    taps: Mapping[str, Observer | Sequence[Observer]],
    *,
    threads: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> None:
    """Run the graph over the data once, and show each tapped tensor's rows [R, K] to its observers, batch by batch.

    taps: by name of a tensor of the graph, or `kv_cache.i.key` and `kv_cache.i.value` for what layer i writes into its cache
        (rows [R, kv_heads · head_dim], keys after their rotation).
    Memory is that of one batch of `batch_tokens` tokens and of the observers.
    Raises InputError for an unknown tensor, for data that doesn't fit the model, and where a tensor holds a NaN or an
    infinity: with its name, the sample and the token.
    """
    check_data(graph, data)
    tapped, outputs = _tapped(graph, list(taps))
    runner = Runner(tapped, max(len(ids) for ids in data), threads)
    observers = {name: list(o) if isinstance(o, Sequence) else [o] for name, o in taps.items()}
    for batch in _with_bar(batches(data, batch_tokens)):
        found = runner.run(batch, list(dict.fromkeys(outputs.values())))
        arrays = dict(zip(dict.fromkeys(outputs.values()), found, strict=True))
        for name, output in outputs.items():
            rows = arrays[output]
            if output.startswith("present_"):
                rows = _cached(rows, batch, graph.kv_layers()[int(output.rpartition(".")[2])].head_dim)
            check_finite(rows, name, batch)
            for observer in observers[name]:
                observer.add(rows)


def logits(graph: Graph, data: Sequence[Ids], *, threads: int | None = None) -> Iterator[np.ndarray]:
    """The logits [tokens, vocab] of each sample, by the graph alone."""
    check_data(graph, data)
    runner = Runner(graph, max(len(ids) for ids in data), threads)
    for batch in batches(data):
        [found] = runner.run(batch, ["logits"])
        yield from np.split(found, np.cumsum(batch.lengths)[:-1])


def check_finite(rows: np.ndarray, name: str, batch: Batch) -> None:
    """Raises InputError, with the sample and the token, where rows of `batch` hold a NaN or an infinity."""
    fine = np.isfinite(rows.reshape(len(rows), -1)).all(1)
    if not fine.all():
        sample, token = batch.place(int(np.argmin(fine)))
        what = "a NaN" if np.isnan(rows).any() else "an infinity"
        raise InputError(
            f"{name} holds {what} in calibration sample {sample}, token {token}: the model overflows there, or its weights are damaged"
        )


def _tapped(graph: Graph, names: Sequence[str]) -> tuple[Graph, dict[str, str]]:
    """The graph with its tapped tensors as outputs, and the output by tap."""
    result = graph.copy()
    edit = Editor(result)
    surgeon = edit.surgeon
    tensors = surgeon.tensors()
    layers = [layer.name for layer in graph.kv_layers()]
    cached = {f"{layer}.{what}": f"present_{what}.{i}" for i, layer in enumerate(layers) for what in ("key", "value")}
    surgeon.outputs = [t for t in surgeon.outputs if t.name != "logits"] if "logits" not in names else surgeon.outputs
    outputs: dict[str, str] = {}
    for name in names:
        if name in cached:
            outputs[name] = cached[name]
        elif name == "logits":
            outputs[name] = name
        elif name in tensors:
            tensor = tensors[name]
            copied = edit.add("Identity", "calibration", [tensor], dtype=tensor.dtype, shape=tensor.shape)
            surgeon.outputs.append(copied)
            outputs[name] = copied.name
        else:
            raise InputError(f"the graph has no tensor {name!r} to look at ({nearest(name, [*tensors, *cached])})")
    if not outputs:
        raise InputError("nothing to look at: give at least one tensor")
    return result, outputs


def _cached(slots: np.ndarray, batch: Batch, head_dim: int) -> np.ndarray:
    """Slots [R, heads, capacity, width] → rows [T, heads · head_dim] of what lies in them."""
    rows = [slots[i, :, :n, :head_dim].transpose(1, 0, 2).reshape(n, -1) for i, n in enumerate(batch.lengths)]
    return np.concatenate(rows)


def _with_bar(work: Sequence[Batch]) -> Iterator[Batch]:
    bar, remove = make_bar(sum(sum(b.lengths) for b in work), desc="calibrating", unit="token", unit_scale=True)
    try:
        for batch in work:
            yield batch
            bar.update(sum(batch.lengths))
    finally:
        remove()
