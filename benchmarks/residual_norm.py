"""Does adding the residual inside the norm pay on ONNX Runtime's CPU, or adding it inside the product before?

The dense part of SmolLM2-135M (30 layers, random weights, no attention) in two forms: the residual as the third operand
of Gemm, then a norm (what the lowering writes), and a plain Gemm, then SkipSimplifiedLayerNormalization, whose second
output is the sum. Prints the median step of each, the forms taking turns.

Usage: python benchmarks/residual_norm.py [--rounds 40] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import onnx
import onnxruntime as ort
from machine import describe, summary
from onnx import TensorProto, helper, numpy_helper

from llmlab.zoo.shapes import SHAPES

ROWS = {"decode, batch 1": 1, "decode, batch 8": 8, "prefill, 128 tokens": 128}


def model(skip: bool) -> bytes:
    """The dense layers; with `skip` the residual is added in the norm, else in the product."""
    sizes = SHAPES["smollm2-135m"]
    hidden, inner, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights = [numpy_helper.from_array(np.ones(hidden, np.float32), "ones")]

    def gemm(x: str, out: str, n: int, k: int, addend: str | None = None) -> str:
        weights.append(numpy_helper.from_array(rng.standard_normal((n, k), np.float32) * np.float32(0.02), f"{out}.w"))
        inputs = [x, f"{out}.w"] + ([addend] if addend else [])
        nodes.append(helper.make_node("Gemm", inputs, [out], transB=1))
        return out

    def norm(product: str, stream: str, at: str) -> tuple[str, str]:
        """(normed, the residual stream after the sum)."""
        if not skip:
            nodes.append(helper.make_node("RMSNormalization", [product, "ones"], [f"{at}.n"], axis=-1, epsilon=1e-5))
            return f"{at}.n", product
        op, inputs, outputs = (
            "SkipSimplifiedLayerNormalization",
            [product, stream, "ones"],
            [f"{at}.n", "", "", f"{at}.s"],
        )
        nodes.append(helper.make_node(op, inputs, outputs, domain="com.microsoft", epsilon=1e-5))
        return f"{at}.n", f"{at}.s"

    stream = "x"
    nodes.append(helper.make_node("RMSNormalization", ["x", "ones"], ["n"], axis=-1, epsilon=1e-5))
    normed = "n"
    for i in range(layers):
        attention = gemm(normed, f"{i}.v", hidden, hidden)
        out = gemm(attention, f"{i}.o", hidden, hidden, None if skip else stream)
        normed, stream = norm(out, stream, f"{i}.a")
        gate, up = gemm(normed, f"{i}.g", inner, hidden), gemm(normed, f"{i}.u", inner, hidden)
        nodes.append(helper.make_node("Sigmoid", [gate], [f"{i}.sg"]))
        nodes.append(helper.make_node("Mul", [gate, f"{i}.sg"], [f"{i}.si"]))
        nodes.append(helper.make_node("Mul", [f"{i}.si", up], [f"{i}.m"]))
        out = gemm(f"{i}.m", f"{i}.d", hidden, inner, None if skip else stream)
        normed, stream = norm(out, stream, f"{i}.b")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", hidden]) for name in ("x", normed)]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "dense", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()


def session(skip: bool, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model(skip), options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    sessions = {"in the product": session(False, arguments.threads), "in the norm": session(True, arguments.threads)}
    print(summary(describe()))
    for name, rows in ROWS.items():
        x = np.random.default_rng(1).standard_normal((rows, SHAPES["smollm2-135m"]["hidden_size"]), np.float32)
        results = [s.run(None, {"x": x})[0] for s in sessions.values()]
        np.testing.assert_allclose(results[0], results[1], rtol=1e-3, atol=1e-4)
        times: dict[str, list[float]] = {form: [] for form in sessions}
        for _ in range(arguments.rounds):
            for form, run in sessions.items():
                start = time.perf_counter()
                run.run(None, {"x": x})
                times[form].append(time.perf_counter() - start)
        print(f"{name:20}", *(f"{form}: {1e3 * statistics.median(t):.2f} ms" for form, t in times.items()), sep="  ")


if __name__ == "__main__":
    main()
