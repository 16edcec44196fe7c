"""The engine that others are held against: what it says of the data is computed once, and kept on disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmlab.errors import InputError
from llmlab.evaluate.samples import Data, Sample, samples
from llmlab.evaluate.teacher import MAX_SEQUENCES, teacher_forced
from llmlab.progress import make_bar
from llmlab.runtime.engine import Engine
from llmlab.runtime.llm import LLM
from llmlab.runtime.params import SamplingParams
from llmlab.runtime.session import Prompt
from llmlab.text.tokenizer import Tokenizer

_LONGER = 8
"""Tokens that an answer may go on after the right one ends; it is wrong then anyway."""
_CONTINUED = 64
"""Tokens that a text is continued with."""


class Reference:
    """Logits of an engine after every token of the data, and its greedy answers.

    data, samples, length, seed: see `llmlab.evaluate`. answers: whether greedy answers are wanted as well. The logits are
    float32 in a file that lies in the system's folder for temporary files while this is open; it is a context manager.
    Raises InputError for data that can't be used, or where the disk has no room for the logits.
    """

    def __init__(
        self,
        engine: Engine | str | Path,
        data: Data = "tinychat",
        *,
        samples: int = 64,
        length: int = 256,
        seed: int = 0,
        threads: int | None = None,
        answers: bool = True,
        progress: bool = True,
    ) -> None:
        self.engine = load(engine)
        self.samples = read(self.engine, data, samples, length, seed)
        self.seed = seed
        self._starts = np.cumsum([0, *(s.scored for s in self.samples)])
        self._folder = tempfile.TemporaryDirectory(prefix="llmlab-reference-")
        try:
            with opened(self.engine, threads) as llm:
                self.vocab_size = llm.core.backend.limits.vocab_size
                self._logits = self._file()
                for sample, place, rows in logits(llm, self.engine, self.samples, progress=progress):
                    self.rows(sample, place, len(rows))[:] = rows
                self.answers = greedy(llm, self.samples) if answers else None
        except BaseException:
            self.close()
            raise

    def rows(self, sample: int, place: int, count: int) -> NDArray[np.float32]:
        """Logits [count, vocab] for the tokens from `place` of a sample on."""
        start = int(self._starts[sample]) + place - self.samples[sample].first
        return self._logits[start : start + count]

    def close(self) -> None:
        self._folder.cleanup()

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _file(self) -> NDArray[np.float32]:
        shape = (int(self._starts[-1]), self.vocab_size)
        size, free = 4 * shape[0] * shape[1], shutil.disk_usage(self._folder.name).free
        if size > free:
            raise InputError(
                f"the reference's logits take {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free for temporary files: "
                "give fewer samples, or set TMPDIR"
            )
        return np.memmap(Path(self._folder.name) / "logits", np.float32, "w+", shape=shape)


def load(engine: Engine | str | Path) -> Engine:
    return engine if isinstance(engine, Engine) else Engine.load(engine)


def read(engine: Engine, data: Data, count: int, length: int, seed: int) -> list[Sample]:
    """The data as this engine's token ids."""
    tokenizer = Tokenizer(engine.path) if (engine.path / "tokenizer.json").is_file() else None
    eos = engine.manifest.eos_token_ids
    longest = min(length, engine.manifest.max_seq_len) if isinstance(length, int) else length
    return samples(data, tokenizer, count=count, length=longest, eos=eos[0] if eos else None, seed=seed)


@contextmanager
def opened(engine: Engine, threads: int | None) -> Iterator[LLM]:
    with LLM(engine, threads=threads, max_num_seqs=min(MAX_SEQUENCES, engine.manifest.max_num_seqs)) as llm:
        yield llm


def logits(
    llm: LLM, engine: Engine, given: Sequence[Sample], *, progress: bool
) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """`teacher_forced` over an engine that is open and idle, with a progress bar."""
    total = sum(s.scored for s in given)
    bar, remove = make_bar(total, desc=f"logits of {engine.path.name}", unit="tokens") if progress else (None, None)
    try:
        for sample, place, rows in teacher_forced(llm.core.backend, given, rows=engine.manifest.max_num_seqs):
            yield sample, place, rows
            if bar is not None:
                bar.update(len(rows))
    finally:
        if remove is not None:
            remove()


def greedy(llm: LLM, given: Sequence[Sample]) -> list[list[int]]:
    """The tokens that the engine itself says: answers to prompts, and how it goes on after half of a text."""
    longest = llm.core.backend.limits.max_seq_len
    prompts: list[Prompt] = []
    params: list[SamplingParams] = []
    for sample in given:
        split = sample.first if sample.answer is not None else (len(sample.ids) + 1) // 2
        rest = len(sample.ids) - split
        wanted = rest + _LONGER if sample.answer is not None else min(_CONTINUED, rest)
        prompts.append(sample.ids[:split].tolist())
        params.append(SamplingParams(max_tokens=max(1, min(wanted, longest - split)), temperature=0, top_k=0, top_p=1))
    results = llm.generate(prompts, params, progress=False)
    return [result.token_ids for result in (results if isinstance(results, list) else [results])]
