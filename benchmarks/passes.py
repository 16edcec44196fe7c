"""What each pass earns: nodes, weight bytes and ONNX Runtime's step time with all passes and with one left out.

    python benchmarks/passes.py tinychat --threads 2 --json benchmarks/results/passes.json

The same table as `llmlab inspect --passes`, with the machine it was measured on, more rounds, and a file for all numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import machine
from rich.console import Console

from llmlab.ablation import Ablation, measure
from llmlab.graph.export import export
from llmlab.graph.graph import Graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint, the name tinychat, or a plain graph's folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=31, help="how often both models take turns")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    args = parser.parse_args()

    about = machine.describe()
    graph = Graph.load(args.model) if (Path(args.model) / "graph.json").is_file() else export(args.model)
    rows = []
    for row, total in measure(graph, threads=args.threads, rounds=args.rounds):
        rows.append(row)
        print(f"\r\033[K{len(rows)} of {total}: {row.name}", end="", file=sys.stderr, flush=True)
    print("\r\033[K", end="", file=sys.stderr)
    result = Ablation(Path(args.model).name, tuple(rows))
    print(machine.summary(about))
    print(
        f"{args.threads} threads; medians of {args.rounds} rounds in turn, ≈ 0 where the quartiles disagree on who is faster"
    )
    Console(width=120).print(result)
    if args.json:
        settings = {"threads": args.threads, "rounds": args.rounds}
        content = {"machine": about, "settings": settings, "results": result.to_dict()}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
