"""NeMo's tensors by the names, and in the layouts, of the Hugging Face model: views into the archive, computed when written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmlab.checkpoint import StoredTensor
from llmlab.errors import CheckpointError
from llmlab.graph.sources.nemo.archive import Rank
from llmlab.graph.sources.nemo.config import NemoConfig
from llmlab.graph.store.lazy import Joined, Rearranged, Values, part, swapped

# Megatron core's names, then the older ones, of what is in a layer and around the layers, and what they are called here.
_LAYER = {
    "self_attention.linear_qkv": "qkv",
    "self_attention.linear_qkv.layer_norm": "norm1",
    "input_layernorm": "norm1",
    "self_attention.linear_proj": "out",
    "mlp.linear_fc1": "fc1",
    "mlp.linear_fc1.layer_norm": "norm2",
    "pre_mlp_layernorm": "norm2",
    "mlp.linear_fc2": "fc2",
    "self_attention.query_key_value": "qkv",
    "self_attention.dense": "out",
    "post_attention_layernorm": "norm2",
    "mlp.dense_h_to_4h": "fc1",
    "mlp.dense_h_to_4h_2": "fc1_up",  # gated, without "fast-": apart
    "mlp.dense_4h_to_h": "fc2",
}
_AROUND = {
    "embedding.word_embeddings": "tokens",
    "embedding.position_embeddings": "positions",
    "decoder.final_layernorm": "norm",
    "output_layer": "head",
    "language_model.embedding.word_embeddings": "tokens",
    "language_model.embedding.position_embeddings": "positions",
    "language_model.encoder.final_layernorm": "norm",
    "language_model.output_layer": "head",
}
_NAME = re.compile(
    r"(?:model\.)?(?:module\.)?(?:(?:language_model\.encoder|decoder)\.layers\.(?P<layer>\d+)\.)?(?P<part>.+)[._](?P<kind>weight|bias)"
)
_DERIVED = ("inv_freq",)
_LAST_STAGE = "model.word_embeddings.weight"  # the tied embedding, once more, on the last pipeline stage
_ROWS = frozenset(("qkv", "fc1", "fc1_up", "tokens", "head"))  # what tensor parallelism splits by rows,
_COLUMNS = frozenset(("out", "fc2"))  # by columns (their biases are whole on every rank); the rest is whole everywhere


@dataclass(frozen=True)
class NemoTensor:
    """A tensor under its Hugging Face name; `map` gives its values without loading them."""

    path: Path
    values: Values

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(d) for d in self.values.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.values.dtype)

    def map(self) -> Values:
        return self.values


def vocabulary(ranks: Sequence[Rank], where: str) -> int:
    """Rows of the token embedding, over all ranks; NeMo pads it, so the config doesn't say."""
    shards = _by_place(ranks, where).get((-1, "tokens", "weight"), ())
    return sum(int(s.shape[0]) for s in shards if s.shape)


def convert(path: Path, ranks: Sequence[Rank], config: NemoConfig, model_type: str) -> dict[str, NemoTensor]:
    """The tensors of the Hugging Face model `model_type` by name. Raises CheckpointError where one is missing or misshapen."""
    model = _Model(_by_place(ranks, config.where), config)
    tensors = model.gpt2() if model_type == "gpt2" else model.llama(model_type == "nemotron")
    return {name: NemoTensor(path, values) for name, values in tensors}


Place = tuple[int, str, str]
"""Layer (-1 around them), what it is, weight or bias."""


def _by_place(ranks: Sequence[Rank], where: str) -> dict[Place, list[StoredTensor]]:
    """Each tensor's shards, one a tensor-parallel rank. Layers are counted from zero on every pipeline stage."""
    places: dict[Place, list[StoredTensor]] = {}
    first = 0
    for stage in sorted({rank.pipeline for rank in ranks}):
        deepest = first - 1
        for rank in (r for r in ranks if r.pipeline == stage):
            for name, tensor in rank.weights.items():
                if name.endswith(_DERIVED) or (name == _LAST_STAGE and stage > 0):
                    continue
                layer, what, kind = _place(name, where)
                if layer >= 0:
                    layer += first
                    deepest = max(deepest, layer)
                places.setdefault((layer, what, kind), []).append(tensor)
        first = deepest + 1
    return places


def _place(name: str, where: str) -> Place:
    match = _NAME.fullmatch(name)
    if match is not None:
        layer, known = match["layer"], _AROUND if match["layer"] is None else _LAYER
        if match["part"] in known:
            return -1 if layer is None else int(layer), known[match["part"]], match["kind"]
    raise CheckpointError(
        f"{where}: holds '{name[:100]}', which has no place in a GPT model: adapters and experts aren't read"
    )


class _Model:
    def __init__(self, places: Mapping[Place, list[StoredTensor]], config: NemoConfig) -> None:
        self._places, self._config = places, config
        deepest = 1 + max((layer for layer, _, _ in places), default=-1)
        if deepest != config.layers:
            raise CheckpointError(f"{config.where}: num_layers is {config.layers}, the weights have {deepest} layers")

    def llama(self, plus_one: bool) -> Iterator[tuple[str, Values]]:
        """Llama's names, which qwen2 and nemotron share. `plus_one`: the model adds one to a norm's weight itself."""
        c = self._config
        yield "model.embed_tokens.weight", self._whole(-1, "tokens", "weight")
        for layer in range(c.layers):
            at = f"model.layers.{layer}"
            for norm, name in (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")):
                yield from self._norm(layer, norm, f"{at}.{name}", plus_one)
            for kind in ("weight", "bias") if c.qkv_bias else ("weight",):
                for name, values in zip("qkv", self._qkv(layer, kind), strict=True):
                    yield f"{at}.self_attn.{name}_proj.{kind}", values
            for kind in ("weight", "bias") if c.bias else ("weight",):
                yield f"{at}.self_attn.o_proj.{kind}", self._whole(layer, "out", kind)
                if c.gated:
                    for name, values in zip(("gate", "up"), self._gate_up(layer, kind), strict=True):
                        yield f"{at}.mlp.{name}_proj.{kind}", values
                else:
                    yield f"{at}.mlp.up_proj.{kind}", self._whole(layer, "fc1", kind)
                yield f"{at}.mlp.down_proj.{kind}", self._whole(layer, "fc2", kind)
        yield from self._norm(-1, "norm", "model.norm", plus_one)
        if not c.tied:
            yield "lm_head.weight", self._whole(-1, "head", "weight")

    def gpt2(self) -> Iterator[tuple[str, Values]]:
        """GPT-2's names. Its products hold their weights [in, out], and always have biases."""
        c = self._config
        yield "transformer.wte.weight", self._whole(-1, "tokens", "weight")
        yield "transformer.wpe.weight", self._whole(-1, "positions", "weight")
        for layer in range(c.layers):
            at = f"transformer.h.{layer}"
            yield from self._norm(layer, "norm1", f"{at}.ln_1", False)
            yield from self._norm(layer, "norm2", f"{at}.ln_2", False)
            qkv = Joined(self._qkv(layer, "weight"))
            yield f"{at}.attn.c_attn.weight", swapped(qkv, 0, 1)
            yield f"{at}.attn.c_attn.bias", Joined(self._qkv(layer, "bias")) if c.qkv_bias else _zeros(qkv)
            for what, name in (("out", "attn.c_proj"), ("fc1", "mlp.c_fc"), ("fc2", "mlp.c_proj")):
                weight = self._whole(layer, what, "weight")
                yield f"{at}.{name}.weight", swapped(weight, 0, 1)
                yield f"{at}.{name}.bias", self._whole(layer, what, "bias") if c.bias else _zeros(weight)
        yield from self._norm(-1, "norm", "transformer.ln_f", False)
        if not c.tied:
            yield "lm_head.weight", self._whole(-1, "head", "weight")

    def _shards(self, layer: int, what: str, kind: str) -> list[Values]:
        found = self._places.get((layer, what, kind))
        if not found:
            at = f"layer {layer}" if layer >= 0 else "the model"
            raise CheckpointError(
                f"{self._config.where}: the weights have no {kind} for '{what}' of {at}; the archive is incomplete"
            )
        return [tensor.map() for tensor in found]

    def _whole(self, layer: int, what: str, kind: str) -> Values:
        shards = self._shards(layer, what, kind)
        axis = 0 if what in _ROWS else 1 if what in _COLUMNS and kind == "weight" else None
        return self._joined(shards, axis, f"{what}.{kind}") if axis is not None and len(shards) > 1 else shards[0]

    def _joined(self, shards: Sequence[Values], axis: int, name: str) -> Values:
        try:
            return Joined(shards, axis)
        except (ValueError, IndexError) as problem:
            raise CheckpointError(f"{self._config.where}: the shards of '{name}' don't fit: {problem}") from problem

    def _qkv(self, layer: int, kind: str) -> list[Values]:
        """q, k and v of a fused projection: for each group its query heads, then its key head, then its value head."""
        c = self._config
        shards = self._shards(layer, "qkv", kind)
        groups, heads = c.groups // len(shards), c.heads // c.groups
        rows = (groups * (heads + 2) * c.head_dim, *shards[0].shape[1:])
        if c.groups % len(shards) or any(tuple(s.shape) != rows for s in shards):
            raise CheckpointError(
                f"{c.where}: the fused QKV {kind} of layer {layer} has shape {list(shards[0].shape)} on {len(shards)} ranks, "
                f"expected {list(rows)}: {c.groups} groups of {heads} + 2 heads of {c.head_dim}"
            )
        parts = ((0, heads), (heads, heads + 1), (heads + 1, heads + 2))
        return [self._of_ranks([_heads(s, groups, heads + 2, c.head_dim, *p) for s in shards]) for p in parts]

    def _gate_up(self, layer: int, kind: str) -> list[Values]:
        """Gate and up: the halves of every rank's fused projection, or a tensor each."""
        gate = self._shards(layer, "fc1", kind)
        if (layer, "fc1_up", kind) in self._places:
            return [self._of_ranks(gate), self._of_ranks(self._shards(layer, "fc1_up", kind))]
        half = self._config.inner // len(gate)
        if any(s.shape[0] != 2 * half for s in gate):
            raise CheckpointError(
                f"{self._config.where}: the fused gate and up {kind} of layer {layer} has {gate[0].shape[0]} rows, expected {2 * half}"
            )
        return [self._of_ranks([part(s, 0, at, at + half) for s in gate]) for at in (0, half)]

    def _of_ranks(self, shards: Sequence[Values]) -> Values:
        return shards[0] if len(shards) == 1 else self._joined(shards, 0, "qkv, gate or up")

    def _norm(self, layer: int, what: str, name: str, plus_one: bool) -> Iterator[tuple[str, Values]]:
        """Weight and, for LayerNorm, bias; small enough to be computed here, in float32."""
        weight = np.asarray(_array(self._whole(layer, what, "weight")), np.float32)
        yield f"{name}.weight", weight + np.float32(int(self._config.from_zero) - int(plus_one))
        if not self._config.rms:
            yield f"{name}.bias", self._whole(layer, what, "bias")


def _heads(fused: Values, groups: int, per_group: int, dim: int, begin: int, end: int) -> Values:
    """Heads `begin` to `end` of every group of a fused projection [groups · per_group · dim, …]."""
    rest = tuple(fused.shape[1:])

    def arrange(array: np.ndarray) -> np.ndarray:
        return array.reshape(groups, per_group, dim, *rest)[:, begin:end].reshape(-1, *rest)

    return Rearranged(fused, arrange, (groups * (end - begin) * dim, *rest))


def _array(values: Values) -> np.ndarray:
    return values if isinstance(values, np.ndarray) else values.load()


def _zeros(weight: Values) -> np.ndarray:
    """The bias of a product that has none, of weight [out, in]."""
    return np.zeros(weight.shape[0], np.float32)
