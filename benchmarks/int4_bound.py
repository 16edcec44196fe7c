"""What a decode step of an int4 model costs inside ONNX Runtime, and what of it is products: a bound for any runtime on these kernels.

    python benchmarks/int4_bound.py --engine ENGINE --peer GENAI_MODEL --json benchmarks/results/int4_bound.json

In turn: onnxruntime-genai's model as its builder wrote it, llmlab's, llmlab's for many rows (of an engine that has one, at a batch of 8: that is
what runs there), and llmlab's MatMulNBits nodes alone, each on an input of its own. All run by ONNX Runtime's Python interface on bound buffers,
without either runtime's loop; keys and values of --context tokens. The time of a step is the least of each burst, its median over bursts; a burst
begins when the other graphs' threads have gone to sleep.

Where a step's time goes on the 360M shape, by ONNX Runtime's own profile, which adds about 3 µs to each node (2 threads, context 144, 2 vCPU with
AVX2 and without VNNI, the fastest fifth of the steps; ms, and nodes in brackets):

    | batch, graph                  | products    | attention | norms     | SwiGLU    | rounding rows | Gather, Reshape, Split |
    |-------------------------------|-------------|-----------|-----------|-----------|---------------|------------------------|
    | 1, onnxruntime-genai          | 12.0 (161)  |  1.7 (32) | 0.7 (65)  | 0.5 (64)  |               |                        |
    | 1, llmlab                     | 11.0 (129)  |  1.6 (32) | 0.7 (65)  | 0.5 (64)  |               | 1.0 (131)              |
    | 8, onnxruntime-genai          | 49.4 (161)  | 12.2 (32) | 1.4 (65)  | 1.2 (64)  |               |                        |
    | 8, llmlab                     | 50.1 (129)  | 10.4 (32) | 1.7 (65)  | 1.5 (64)  |               | 2.6 (131)              |
    | 8, llmlab, many rows          | 40.3 (129)  | 10.5 (32) | 1.7 (65)  | 1.4 (64)  | 9.5 (645)     | 2.4 (131)              |

At a batch of 1 both run the same MatMulNBits kernels on the same bytes. 226 MB a step are 5.7 ms at the 40 GB/s that two threads read here, so it is
the kernels' arithmetic that takes 11: one thread alone takes 16.4, two 10.9. The products alone are 1.25 to 1.33 times as fast as
onnxruntime-genai's whole step. A step 1.15 times as fast leaves 1.0 to 2.0 ms for all else, which takes 2.9 to 3.6 here: attention 1.0 to 1.2
(12 MB of keys and values are read), and 321 other nodes about 5 µs each, whatever they compute. 96 of them are Gather and Reshape round the attention,
which a graph for decodes alone would not need (0.5 ms, measured); without them it would be 1.08 times.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

_TYPES = {f"tensor({name})": dtype for name, dtype in (("float", np.float32), ("int64", np.int64), ("int32", np.int32))}
PAUSE_S, STEPS = 0.03, 6
MANY_ROWS = "llmlab's, many rows"


def products_alone(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = model.graph
    nodes = [n for n in graph.node if n.op_type == "MatMulNBits"]
    depths = set()
    for node in nodes:
        depth = next(a.i for a in node.attribute if a.name == "K")
        node.input[0] = f"x{depth}"
        depths.add(depth)
    read = {name for node in nodes for name in node.input}
    kept = [t for t in graph.initializer if t.name in read]
    inputs = [helper.make_tensor_value_info(f"x{d}", onnx.TensorProto.FLOAT, ["R", d]) for d in sorted(depths)]
    outputs = [helper.make_tensor_value_info(n.output[0], onnx.TensorProto.FLOAT, None) for n in nodes]
    made = helper.make_graph(nodes, "products", inputs, outputs, kept)
    return helper.make_model(made, opset_imports=model.opset_import, ir_version=model.ir_version)


class Step:
    """A session and the buffers of one decode step: `batch` sequences of `context` tokens, this step's included."""

    def __init__(self, path: Path, batch: int, context: int, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.binding, self.arrays, self.least = self.session.io_binding(), [], list[float]()
        outputs = {o.name for o in self.session.get_outputs()}
        for given in self.session.get_inputs():
            sizes = [d if isinstance(d, int) else batch for d in given.shape]
            if given.name.startswith("past_key_values"):
                decoder = json.loads((path.parent / "genai_config.json").read_text())["model"]["decoder"]
                sizes[1:] = decoder["num_key_value_heads"], context, decoder["head_size"]
            elif given.name in ("input_ids", "attention_mask", "unpack_index") and len(sizes) == 2:
                sizes[1] = context if given.name == "attention_mask" else 1
            array = self._values(given.name, tuple(sizes), context).astype(_TYPES[given.type])
            self.binding.bind_input(given.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            present = given.name.replace("past_key_values", "present").replace("past_", "present_")
            if present in outputs:
                self.binding.bind_output(present, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            self.arrays.append(array)
        for name in outputs:
            if not name.startswith("present"):
                self.binding.bind_output(name, "cpu")

    @staticmethod
    def _values(name: str, sizes: tuple[int, ...], context: int) -> Any:
        rows = np.arange(int(np.prod(sizes))).reshape(sizes) if len(sizes) < 3 else None
        if name in ("unpack_index", "pack_index", "logits_index") and rows is not None:
            return rows
        numbers = {"input_ids": 7, "seqlens_k": context - 1, "query_seqlens": 1, "attention_mask": 1}
        if name in numbers:
            return np.full(sizes, numbers[name])
        return np.random.default_rng(0).standard_normal(sizes, np.float32)

    def burst(self) -> None:
        time.sleep(PAUSE_S)
        seconds = []
        for _ in range(STEPS):
            began = time.perf_counter()
            self.session.run_with_iobinding(self.binding)
            seconds.append(time.perf_counter() - began)
        self.least.append(min(seconds[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True, help="an int4 engine of llmlab")
    parser.add_argument(
        "--peer", type=Path, required=True, help="the folder that onnxruntime-genai's builder wrote of it"
    )
    parser.add_argument("--context", type=int, default=144)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bursts", type=int, default=12)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    products = products_alone(onnx.load(args.engine / "model.onnx", load_external_data=False))
    with tempfile.NamedTemporaryFile(dir=args.engine, suffix=".onnx") as file:  # beside the weights, which it refers to
        file.write(products.SerializeToString())
        file.flush()
        paths = {
            "onnxruntime-genai's graph": args.peer / "model.onnx",
            "llmlab's graph": args.engine / "model.onnx",
            "its products alone": Path(file.name),
            MANY_ROWS: args.engine / "prefill.onnx",
        }
        for batch in (1, 8):
            run = {n: p for n, p in paths.items() if n != MANY_ROWS or (batch == 8 and p.exists())}
            steps = {name: Step(path, batch, args.context, args.threads) for name, path in run.items()}
            for _ in range(args.bursts):
                for step in steps.values():
                    step.burst()
            first = np.array(next(iter(steps.values())).least)
            for name, step in steps.items():
                ratio = np.median(first / np.array(step.least))
                row = {"ms": round(float(np.median(step.least)) * 1e3, 2), "speed": round(float(ratio), 3)}
                found.setdefault(f"B={batch}", {})[name] = row
                print(f"B={batch} {name:28} {row['ms']:7.2f} ms, {row['speed']:.2f}× the first")
    about = machine.describe({})
    print(machine.summary(about), file=sys.stderr)
    if args.json:
        settings = {"threads": args.threads, "context": args.context, "bursts": args.bursts}
        args.json.write_text(json.dumps({"machine": about, "settings": settings, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
