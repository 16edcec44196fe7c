"""A NeMo archive, opened as the checkpoint of the Hugging Face model that computes the same."""

from __future__ import annotations

from pathlib import Path

from llmlab.checkpoint import Checkpoint
from llmlab.config import ModelConfig
from llmlab.graph.sources.nemo.archive import CONFIG, Archive
from llmlab.graph.sources.nemo.config import NemoConfig
from llmlab.graph.sources.nemo.tokenizer import read_tokenizer
from llmlab.graph.sources.nemo.weights import convert, vocabulary


def is_nemo(path: Path) -> bool:
    """Whether `path` is a .nemo file or a folder that one was unpacked into."""
    return (path.suffix == ".nemo" and path.is_file()) or (path / CONFIG).is_file()


class NemoCheckpoint(Checkpoint):
    """A .nemo file or its unpacked folder: config and names as Hugging Face has them, weights as views into the archive.

    Close it once its weights are mapped: a gzipped archive lies unzipped in a temporary file until then.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path
        self._archive = Archive(path)
        try:
            config = NemoConfig(self._archive.read(CONFIG), f"{path}: {CONFIG}")
            ranks = self._archive.ranks()
            raw = config.to_hf(vocabulary(ranks, config.where))
            self.weights = convert(path, ranks, config, raw["model_type"])
            self.assets, ids = read_tokenizer(self._archive, config.raw.get("tokenizer"))
            self.config = ModelConfig.from_hf(raw | ids, where=config.where)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._archive.close()
