"""A quantized KV cache: the model is run over calibration data, and keys and values are seen as they lie in its cache."""

from __future__ import annotations

from collections.abc import Sequence

from llmlab.graph.graph import Graph
from llmlab.quant.calibrate import observe
from llmlab.quant.data import Ids
from llmlab.quant.kv_scales import CACHES, Scales, scale_of
from llmlab.quant.observers import AbsMax, Rows
from llmlab.quant.scheme import KVCache

_SAMPLE = 256
"""Rows of each layer that ranges are tried on, where a cache has so few bits that clipping pays."""


def kv_scales(
    graph: Graph, cache: KVCache, data: Sequence[Ids], *, seed: int = 0, threads: int | None = None
) -> list[Scales]:
    """The scales of each layer's keys, after their rotation, and values, from the largest that a float32 serving graph writes
    into its cache over `data`; in four bits from the range that loses least. Raises InputError as `observe` does."""
    layers, dtype = graph.kv_layers(), CACHES[cache.dtype]
    narrow = dtype.name == "int4"
    most = {f"{layer.name}.{what}": AbsMax() for layer in layers for what in ("key", "value")}
    some = {name: Rows(_SAMPLE, seed) for name in most} if narrow else {}
    observe(graph, data, {n: [most[n], some[n]] if narrow else [most[n]] for n in most}, threads=threads)
    scales = []
    for layer in layers:
        pair = []
        for name in (f"{layer.name}.key", f"{layer.name}.value"):
            absmax = most[name].absmax
            assert absmax is not None
            pair.append(scale_of(absmax, dtype, cache.per, layer.kv_heads, some[name].sample if narrow else None))
        scales.append(Scales(*pair))
    return scales
