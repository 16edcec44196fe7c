"""The runtimes that are compared, each in a process of its own: `prefill` and `decode` on lists of token ids.

A process is told over stdin what to measure and answers over stdout; between its turns it sleeps, so that no two
thread pools run at once. `Peer` is the caller's end, `serve` the other; neither is meant to be run by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from llama_cpp_peer import LlamaCpp, LlamaCppHead, install
from shapes import engine

GENAI = "onnxruntime-genai==0.18.0"
MAX_SEQ_LEN = 576


class Runtime(Protocol):
    """One loaded runtime. Both calls return seconds, tokens done in them, and the first token of each row."""

    def prefill(self, prompts: list[list[int]]) -> tuple[float, int, list[int]]: ...

    def decode(self, prompts: list[list[int]], steps: int) -> tuple[float, int, list[int]]: ...


class Transformers:
    """`generate`'s own loop, by hand: a cache, the last row's logits only, greedy; without generate's bookkeeping."""

    def __init__(self, checkpoint: Path, cache: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache
        from transformers.utils import logging

        torch.set_num_threads(threads)
        logging.disable_progress_bar()
        self.torch, self.cache_type = torch, DynamicCache
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def prefill(self, prompts: list[list[int]]) -> tuple[float, int, list[int]]:
        ids = self.torch.tensor(prompts)
        with self.torch.inference_mode():
            began = time.perf_counter()
            first, _ = self._forward(ids, self.cache_type(config=self.model.config))
            return time.perf_counter() - began, ids.numel(), first.flatten().tolist()

    def decode(self, prompts: list[list[int]], steps: int) -> tuple[float, int, list[int]]:
        with self.torch.inference_mode():
            first, cache = self._forward(self.torch.tensor(prompts), self.cache_type(config=self.model.config))
            token = first
            began = time.perf_counter()
            for _ in range(steps):
                token, cache = self._forward(token, cache)
                token.tolist()
            return time.perf_counter() - began, steps * len(prompts), first.flatten().tolist()

    def _forward(self, ids: Any, cache: Any) -> tuple[Any, Any]:
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values


class Genai:
    """onnxruntime-genai on the model that its own builder makes, fp32 for the CPU. It samples before it computes: the
    first `generate_next_token` after `append_tokens` only picks from the logits that the prompt left."""

    options: tuple[str, ...] = ()
    precision = "fp32"

    def __init__(self, checkpoint: Path, cache: Path, threads: int) -> None:
        import onnxruntime_genai

        self.genai = onnxruntime_genai
        config = onnxruntime_genai.Config(str(self._build(checkpoint, cache)))
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = onnxruntime_genai.Model(config)

    def _build(self, checkpoint: Path, cache: Path) -> Path:
        folder = cache / "-".join([checkpoint.name, "genai", self.precision, *self.options]).replace("=", "-")
        if not (folder / "genai_config.json").exists():
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint)]
            command += ["-o", str(folder), "-p", self.precision, "-e", "cpu"]
            command += ["--extra_options", *self.options] if self.options else []
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"onnxruntime-genai's builder failed: {done.stderr.strip().splitlines()[-1:]}")
        return folder

    def prefill(self, prompts: list[list[int]]) -> tuple[float, int, list[int]]:
        generator = self._generator(prompts, 1)
        began = time.perf_counter()
        generator.append_tokens(np.array(prompts, np.int32))
        generator.generate_next_token()
        seconds = time.perf_counter() - began
        return seconds, sum(map(len, prompts)), generator.get_next_tokens().tolist()

    def decode(self, prompts: list[list[int]], steps: int) -> tuple[float, int, list[int]]:
        generator = self._generator(prompts, steps + 1)
        generator.append_tokens(np.array(prompts, np.int32))
        generator.generate_next_token()
        first = generator.get_next_tokens().tolist()
        began = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
        seconds = time.perf_counter() - began
        ended = [len(prompts[0]) + steps + 1 != len(generator.get_sequence(row)) for row in range(len(prompts))]
        if any(ended):
            raise RuntimeError("onnxruntime-genai stopped early: a row met its end-of-sequence token; use another seed")
        return seconds, steps * len(prompts), first

    def _generator(self, prompts: list[list[int]], new: int) -> Any:
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(max_length=len(prompts[0]) + new, batch_size=len(prompts), do_sample=False)
        return self.genai.Generator(self.model, params)


class GenaiPruned(Genai):
    """The same, told to compute the logits of the last token of the prompt only, which is not its default."""

    options = ("prune_lm_head=true",)


class GenaiInt4(Genai):
    """Its builder's int4: blocks of 32 in all products, the head included, at accuracy level 4."""

    precision = "int4"


class Llmlab:
    """llmlab through its public interface; times are those of its results."""

    recipe: ClassVar[dict[str, Any] | None] = None
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, checkpoint: Path, cache: Path, threads: int) -> None:
        import llmlab as ll

        self.params = ll.SamplingParams
        folder = engine(checkpoint, cache, MAX_SEQ_LEN, self.recipe, **self.options)
        self.llm = ll.LLM(folder, threads=threads, max_num_seqs=8)

    def prefill(self, prompts: list[list[int]]) -> tuple[float, int, list[int]]:
        began = time.perf_counter()
        results = self.llm.generate(prompts, self._params(1), progress=False)
        seconds = time.perf_counter() - began
        return seconds, sum(map(len, prompts)), [result.token_ids[0] for result in results]

    def decode(self, prompts: list[list[int]], steps: int) -> tuple[float, int, list[int]]:
        results = self.llm.generate(prompts, self._params(steps + 1), progress=False)
        # While all rows decode: from the last row's first token to the first row's last. Prompts may be prefilled over
        # several steps, in which the early rows already decode; those steps are not counted.
        times = [np.cumsum([r.metrics.ttft_s, *r.metrics.itl_s]) for r in results]
        begin, end = max(t[0] for t in times), min(t[-1] for t in times)
        slack = 1e-4  # rows' clocks start within microseconds of each other; steps are milliseconds apart
        tokens = sum(int(((t > begin + slack) & (t <= end + slack)).sum()) for t in times)
        return float(end - begin), tokens, [result.token_ids[0] for result in results]

    def _params(self, tokens: int) -> Any:
        return self.params(max_tokens=tokens, temperature=0.0, ignore_eos=True)


class LlmlabInt4(Llmlab):
    """int4 in groups of 32, the head included, as the others have it."""

    recipe: ClassVar[dict[str, Any] | None] = {"weights": {"dtype": "int4", "group": 32}, "keep": ["embedding"]}


class LlmlabInt4Prefill(LlmlabInt4):
    """The same engine with a second form of its products for steps of many tokens."""

    options: ClassVar[dict[str, Any]] = {"prefill": "int8"}


class LlmlabInt4Group64(LlmlabInt4):
    """Half as many scales to read. Not what the others multiply: as good as their blocks of 32 only with better rounding (GPTQ)."""

    recipe: ClassVar[dict[str, Any] | None] = {"weights": {"dtype": "int4", "group": 64}, "keep": ["embedding"]}


RUNTIMES: dict[str, Any] = {
    "transformers": Transformers,
    "onnxruntime-genai": Genai,
    "onnxruntime-genai-pruned": GenaiPruned,
    "llmlab": Llmlab,
    "onnxruntime-genai-int4": GenaiInt4,
    "llama.cpp-q4_0": LlamaCpp,
    "llama.cpp-q4_0-head": LlamaCppHead,
    "llmlab-int4": LlmlabInt4,
    "llmlab-int4-prefill": LlmlabInt4Prefill,
    "llmlab-int4-group64": LlmlabInt4Group64,
}


def install_genai(cache: Path) -> Path:
    """Install onnxruntime-genai alone into `cache`, beside what this environment has and without changing it."""
    folder = cache / GENAI.replace("==", "-")
    if not folder.exists():
        draft = folder.with_suffix(".part")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(draft), GENAI]
        subprocess.run([*command, "--disable-pip-version-check"], check=True, stdout=sys.stderr)
        draft.rename(folder)
    return folder


class Peer:
    """A runtime in its own process. Use as a context manager."""

    def __init__(self, name: str, checkpoint: Path, cache: Path, threads: int) -> None:
        self.name = name
        path = [str(install_genai(cache))] if name.startswith("onnxruntime-genai") else []
        path += [str(install(cache))] if name.startswith("llama.cpp") else []
        if os.environ.get("PYTHONPATH"):
            path.append(os.environ["PYTHONPATH"])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, name, str(checkpoint), str(cache), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._receive()

    def ask(self, task: str, **arguments: Any) -> dict[str, Any]:
        """Measure once: seconds, tokens, first, cpu_s (used meanwhile) and idle_cpu_s (used since the last time)."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit status {self._process.wait()}: its own message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def serve(name: str, checkpoint: Path, cache: Path, threads: int) -> None:
    """Answer requests until stdin ends. Whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runtime: Runtime = RUNTIMES[name](checkpoint, cache, threads)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    asleep = time.process_time()
    for line in sys.stdin:
        request = json.loads(line)
        woke = time.process_time()
        measure = getattr(runtime, request.pop("task"))
        seconds, tokens, first = measure(**request)
        cpu = time.process_time() - woke
        answer = {"seconds": seconds, "tokens": tokens, "first": first, "cpu_s": cpu, "idle_cpu_s": woke - asleep}
        print(json.dumps(answer), file=answers, flush=True)
        asleep = time.process_time()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=RUNTIMES)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    serve(arguments.name, arguments.checkpoint, arguments.cache, arguments.threads)
