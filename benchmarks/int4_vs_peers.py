"""llmlab's int4 engines against onnxruntime-genai's int4 and llama.cpp's Q4_0 on one checkpoint: CPU, the same threads for all.

    python benchmarks/int4_vs_peers.py --cache CACHE --json benchmarks/results/int4_vs_peers.json

All have blocks of 32 numbers. The head is int4 here and in onnxruntime-genai; llama.cpp keeps it in eight bits (`llama.cpp-q4_0`), and
with `llama.cpp-q4_0-head` has it in four as well. `llmlab-int4-prefill` holds its weights in a second form for steps of many tokens.
Measured as cpu_vs_peers.py does. llama.cpp is compiled from source on the first run, which takes minutes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import machine
from cpu_vs_peers import measure, table
from llama_cpp_peer import LLAMA_CPP
from peers import GENAI, RUNTIMES

from llmlab.zoo.shapes import SHAPES

DEFAULT = ("onnxruntime-genai-int4", "llama.cpp-q4_0", "llama.cpp-q4_0-head", "llmlab-int4", "llmlab-int4-prefill")
OURS = ("llmlab-int4-prefill", "llmlab-int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for checkpoints and engines")
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m", "smollm2-360m"], choices=SHAPES)
    parser.add_argument("--runtimes", nargs="+", default=list(DEFAULT), choices=RUNTIMES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--steps", type=int, default=32, help="decode steps")
    parser.add_argument("--repetitions", type=int, default=5, help="after one more for warming up")
    parser.add_argument("--foreign", type=float, default=0.05, help="largest share of the machine others may take")
    parser.add_argument("--json", type=Path, help="file for all samples")
    args = parser.parse_args()
    args.cache = args.cache.resolve()

    about = machine.describe(dict(name.split("==") for name in (GENAI, LLAMA_CPP[0])))
    settings = {name: getattr(args, name) for name in ("threads", "prompt", "steps", "repetitions")}
    print(machine.summary(about))
    print(f"int4, {args.threads} threads, prompt {args.prompt}, {args.steps} steps; median (quartiles) of", end=" ")
    print(f"{args.repetitions} interleaved repetitions; ×: the named engine's speed over that runtime's\n")
    results = {}
    for shape in args.shapes:
        results[shape] = measure(shape, args.runtimes, args)
        for ours in OURS:
            if ours in args.runtimes:
                print(f"{ours}:\n{table(shape, results[shape], ours)}", end="\n\n", flush=True)
        if args.json:
            args.json.write_text(
                json.dumps({"machine": about, "settings": settings, "results": results}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
