"""How fast an engine is on random tokens: prefill, decode, first token."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmlab.errors import EngineError, InputError

if TYPE_CHECKING:
    from llmlab.runtime.core import EngineCore
    from llmlab.runtime.llm import LLM


@dataclass(frozen=True)
class BenchRow:
    """One batch size. Tokens per second are those of all sequences together."""

    batch: int
    prompt_len: int
    output_len: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    tokens_per_s: float
    """Generated tokens by the time of the whole run, prompts included."""
    first_token_ms: float
    """Until every sequence has its first token."""
    decode_step_ms: float
    """Mean time of a step in which every sequence decodes one token."""
    outside_backend_share: float
    """Share of those steps' time spent outside the backend: scheduling, packing, sampling."""


@contextmanager
def built(shape: str, target: str, sizes: Sequence[int], prompt_len: int, output_len: int) -> Iterator[Path]:
    """The folder of an engine of random weights in the sizes of a known model, built for these batches, then removed."""
    import llmlab as ll
    from llmlab.build import check_target
    from llmlab.zoo.shapes import sizes_of, write_checkpoint

    model = sizes_of(shape)
    check_target(target)
    longest = prompt_len + output_len
    if longest > model["max_position_embeddings"]:
        raise InputError(
            f"prompt and output are {prompt_len} + {output_len} tokens, {shape} takes {model['max_position_embeddings']}: "
            "give a smaller --prompt-len or --output-len"
        )
    config = None
    if target != "onnxruntime":
        step = max(max(sizes), min(2048, max(sizes) * prompt_len))
        config = ll.BuildConfig(max_batch=max(sizes), max_tokens_per_step=step, decode_buckets=tuple(sizes))
    with tempfile.TemporaryDirectory(prefix="llmlab-bench-") as folder:
        checkpoint = write_checkpoint(Path(folder) / "checkpoint", model, "float16", seed=0)
        graph = ll.optimize(ll.export(checkpoint))
        yield ll.build(graph, Path(folder) / "engine", target=target, max_seq_len=longest, config=config).path


def measure(
    engine: str | Path,
    sizes: Sequence[int],
    *,
    prompt_len: int,
    output_len: int,
    repeat: int,
    threads: int | None,
) -> list[BenchRow]:
    """One row a batch size; of `repeat` measurements, after one that doesn't count, the best."""
    from llmlab.runtime.llm import LLM

    with LLM(engine, threads=threads, max_num_seqs=max(sizes)) as llm:
        return measure_open(llm, sizes, prompt_len=prompt_len, output_len=output_len, repeat=repeat)


def measure_open(llm: LLM, sizes: Sequence[int], *, prompt_len: int, output_len: int, repeat: int) -> list[BenchRow]:
    """`measure`, of an LLM that is open and idle."""
    limits = llm.core.backend.limits
    if prompt_len + output_len > limits.max_seq_len:
        raise InputError(
            f"prompt and output are {prompt_len} + {output_len} tokens, this engine holds {limits.max_seq_len}: "
            "give a smaller --prompt-len or --output-len"
        )
    rows = []
    random = np.random.default_rng(0)
    for size in sizes:
        tries = [_once(llm.core, size, prompt_len, output_len, random) for _ in range(repeat + 1)][1:]
        rows.append(
            BenchRow(
                size,
                prompt_len,
                output_len,
                prefill_tokens_per_s=max(t[0] for t in tries),
                decode_tokens_per_s=size / min(t[1] for t in tries),
                tokens_per_s=size * output_len / min(t[3] for t in tries),
                first_token_ms=size * prompt_len / max(t[0] for t in tries) * 1e3,
                decode_step_ms=min(t[1] for t in tries) * 1e3,
                outside_backend_share=min(tries, key=lambda t: t[1])[2],
            )
        )
    return rows


def _once(
    core: EngineCore, size: int, prompt_len: int, output_len: int, random: np.random.Generator
) -> tuple[float, float, float, float]:
    """(prefill tokens per second, seconds of a decode step, share of it outside the backend, seconds of a whole run)."""
    prefill_s, _ = drive(core, size, prompt_len, 1, random)
    whole_s, steps = drive(core, size, prompt_len, output_len, random)
    seconds, execute = sum(step for step, _ in steps), sum(inside for _, inside in steps)
    return size * prompt_len / prefill_s, seconds / len(steps), 1 - execute / seconds, whole_s


def drive(
    core: EngineCore,
    size: int,
    prompt_len: int,
    output_len: int,
    random: np.random.Generator,
    stop: threading.Event | None = None,
) -> tuple[float, list[tuple[float, float]]]:
    """Run `size` requests of random tokens to their end: (seconds, (seconds, seconds in the backend) of each step of decoding only).

    Once `stop` is set it raises KeyboardInterrupt between two steps; requests are then left in the core."""
    from llmlab.runtime.params import SamplingParams
    from llmlab.runtime.request import Request

    params = SamplingParams(max_tokens=output_len, ignore_eos=True, temperature=0, top_k=0, top_p=1)
    for number in range(size):
        prompt = random.integers(0, core.backend.limits.vocab_size, prompt_len)
        core.add(Request(id=f"bench-{number}", prompt_ids=prompt, params=params))
    steps: list[tuple[float, float]] = []
    started = time.perf_counter()
    while core.has_work:
        if stop is not None and stop.is_set():
            raise KeyboardInterrupt
        errors = [update.error for update in core.step() if update.error]
        if errors:
            raise EngineError(errors[0])
        last = core.stats.last
        if last.prefill_tokens == 0 and last.decode_tokens == size:
            steps.append((last.step_s, last.execute_s))
    return time.perf_counter() - started, steps
