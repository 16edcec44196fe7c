"""A Hugging Face checkpoint folder: its config, its weights as memory maps, its tokenizer files. No pickle, no copies."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from llmlab.config import ModelConfig, token_ids
from llmlab.errors import CheckpointError, InputError
from llmlab.files import open_regular, plain_name, read_bytes, read_json

_HEADER_LIMIT = 100 << 20  # bytes, what the safetensors format allows
_SHOWN = 80  # characters of a name
_MOST_AXES = 32  # what every numpy can map
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files that travel with a model from checkpoint to engine, as they are."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies inside a safetensors file."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.dtype.itemsize * math.prod(self.shape)

    def map(self) -> np.ndarray:
        """The tensor as a read-only memory map: no bytes are read until they are used."""
        if 0 in self.shape or not self.shape:
            count = int(np.prod(self.shape))
            return np.fromfile(self.path, self.dtype, count, offset=self.offset).reshape(self.shape)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, after checking that the header fits the file: the tensors fill it, without overlapping.

    Raises CheckpointError.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_HEADER_LIMIT, size - 8):
                raise CheckpointError(
                    f"{path}: header of {length} bytes in a file of {size}: truncated or not safetensors"
                )
            header = json.loads(file.read(length).decode(), object_pairs_hook=lambda pairs: _object(path, pairs))
    except OSError as problem:
        raise CheckpointError(f"{path}: can't be read ({problem.strerror or problem})") from problem
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{path}: its header is not valid JSON: truncated or not safetensors") from problem
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object: not safetensors")
    header.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_filled(path, tensors, 8 + length, size)
    return tensors


def _object(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a name that is there twice, two readers may take different values."""
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise CheckpointError(f"{path}: its header has {twice[:_SHOWN]!r} twice: altered, fetch it again")
    return found


def _check_filled(path: Path, tensors: Mapping[str, StoredTensor], base: int, size: int) -> None:
    """That the tensors fill the bytes from `base` to `size`, as the format demands: nothing is hidden between them."""
    at = base
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].end)):
        if stored.offset < at:
            raise CheckpointError(
                f"{path}: {name!r} overlaps another tensor at byte {stored.offset}: altered, fetch it again"
            )
        if stored.offset > at:
            raise CheckpointError(
                f"{path}: no tensor fills bytes {at} to {stored.offset}, before {name!r}: altered, fetch it again"
            )
        at = stored.end
    if at != size:
        raise CheckpointError(f"{path}: no tensor fills bytes {at} to {size}, the file's last: altered, fetch it again")


def _stored(path: Path, name: str, entry: Any, base: int, size: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = len(shape) <= _MOST_AXES and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as problem:
        raise CheckpointError(f"{path}: the entry of {name!r} is malformed") from problem
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name!r} has type {dtype!r}, expected one of {', '.join(DTYPES)}")
    expected = DTYPES[dtype].itemsize
    for n in shape if numbers else ():
        expected *= n  # Python integers: an absurd shape can't overflow
    if not numbers or end - begin != expected:
        raise CheckpointError(
            f"{path}: {name!r} of shape {list(shape)} and type {dtype} can't fill bytes {begin} to {end}"
        )
    if base + end > size:
        raise CheckpointError(
            f"{path}: {name!r} ends at byte {base + end}, the file at {size}: truncated, fetch it again"
        )
    return StoredTensor(path, DTYPES[dtype], shape, base + begin)


class Weights(Mapping[str, StoredTensor]):
    """The tensors of a checkpoint by name, over one file or the shards that an index names."""

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, StoredTensor] = {}
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if index.is_file():
            entries = read_json(index, CheckpointError)
            shards = entries.get("weight_map") if isinstance(entries, dict) else None
            if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
                raise CheckpointError(f"{index}: no 'weight_map' of tensor to file in it")
            for shard in sorted(set(shards.values())):
                if not plain_name(shard):
                    raise CheckpointError(f"{index}: names the file {shard!r}, expected one inside the folder")
                self._tensors.update(read_safetensors(folder / shard))
            for name in shards:
                if name not in self._tensors:
                    raise CheckpointError(f"{index}: {name!r} is in no shard; the checkpoint is incomplete")
        elif single.is_file():
            self._tensors = read_safetensors(single)
        elif pickled := sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*")):
            raise CheckpointError(
                f"{folder}: only {pickled[0].name} there, a pickle: save it as safetensors (save_pretrained does)"
            )
        else:
            raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json there")

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Tensor(Protocol):
    """A tensor of a checkpoint: `map` gives its values (an array, or one that is computed when it is written)."""

    @property
    def path(self) -> Path: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def map(self) -> Any: ...


class Checkpoint:
    """A checkpoint folder, opened and checked: `config`, `weights`, `assets` (tokenizer files, bytes by name)."""

    weights: Mapping[str, Tensor]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "config.json"
        self.config = ModelConfig.from_hf(read_json(path, CheckpointError), where=str(path))
        self.weights = Weights(folder)
        self.assets = read_assets(folder)

    def close(self) -> None:
        """Let go of what was needed until the weights were mapped."""


def read_assets(folder: Path) -> dict[str, bytes]:
    """The tokenizer's and generation's files in `folder`, by name."""
    return {n: read_bytes(folder / n, CheckpointError) for n in ASSETS if (folder / n).is_file()}


def generation_config(assets: Mapping[str, bytes]) -> dict[str, Any]:
    """The generation_config.json among `assets`, or an empty dict."""
    try:
        value = json.loads(assets.get("generation_config.json", b"{}"))
    except ValueError as problem:
        raise CheckpointError(f"generation_config.json: not valid JSON ({problem})") from problem
    if not isinstance(value, dict):
        raise CheckpointError("generation_config.json: expected a JSON object")
    return value


def eos_ids(config: ModelConfig, assets: Mapping[str, bytes]) -> tuple[int, ...]:
    """Token ids that end an answer: the generation config's, else the model config's."""
    ids = token_ids(generation_config(assets).get("eos_token_id"), "generation_config.json: eos_token_id")
    return ids or config.eos_token_ids


def resolve(source: str | Path) -> Path:
    """The folder of a checkpoint: a local path, the name of a model that ships, or a hub id (downloaded).

    Raises InputError where it is none of them, CheckpointError where the hub has no answer.
    """
    from llmlab import zoo

    path = Path(source).expanduser()
    if path.is_dir():
        return path
    name = str(source)
    if name in zoo.names():
        return zoo.path(name)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) and not path.exists():
        return _download(name)
    kind = "is a file, not a folder" if path.exists() else "is no folder"
    raise InputError(
        f"{name!r} {kind}; expected a checkpoint folder, a hub id such as 'org/model', an .onnx or .nemo file, or one of: {', '.join(zoo.names())}"
    )


def _download(repo: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(repo, allow_patterns=["*.safetensors", "*.json", "*.jinja"])
    except errors.GatedRepoError as problem:
        raise CheckpointError(f"{repo}: gated on the hub; accept its terms there and run `hf auth login`") from problem
    except errors.RepositoryNotFoundError as problem:
        raise CheckpointError(f"{repo}: no such model on the hub (or no access: run `hf auth login`)") from problem
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError, errors.HfHubHTTPError) as problem:
        raise CheckpointError(
            f"{repo}: no folder of that name, and the hub can't be reached: check the path or go online"
        ) from problem
    return Path(folder)
