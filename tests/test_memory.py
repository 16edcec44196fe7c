"""What exporting and building costs in memory: never the weights. Each case runs in a process of its own."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmlab.zoo.shapes import SHAPES, tensors, write_checkpoint

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

WIDE = {
    **SHAPES["llama-2-7b"],
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "vocab_size": 4000,
}
"""222 million parameters in few nodes."""
RUN = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from export_cost import Memory, ours
import onnxruntime, onnxscript, torch, transformers
import llmlab.build, llmlab.graph.export
memory = Memory()
memory.sample()
before = dict(memory.peaks)
seconds = ours(Path(sys.argv[2]), Path(sys.argv[3]), through=sys.argv[4])
memory.sample()
print(json.dumps({"before": before, "seconds": seconds, **memory.peaks}))
"""


def cost(checkpoint: Path, scratch: Path, through: str) -> dict[str, Any]:
    command = [sys.executable, "-c", RUN, str(BENCHMARKS), str(checkpoint), str(scratch), through]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def parameters(sizes: dict[str, Any]) -> int:
    return sum(math.prod(shape) for _, shape in tensors(sizes))


@pytest.mark.parametrize(
    ("through", "dtype"),
    [
        pytest.param("optimize", "bfloat16", marks=pytest.mark.slow),
        ("build", "bfloat16"),
        pytest.param("build", "float32", marks=pytest.mark.slow),
    ],
)
def test_weights_are_never_in_memory(tmp_path: Path, through: str, dtype: str) -> None:
    """As stored they are two or four bytes each; what is written is four."""
    weights = 4 * parameters(WIDE)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", WIDE, dtype, shard_bytes=200 << 20)
    found = cost(checkpoint, tmp_path, through)
    grown = {name: found[name] - found["before"][name] for name in ("anonymous", "peak")}
    share = 0.25 if through == "optimize" else 0.35  # the exporter itself takes 150 MB
    assert grown["anonymous"] < share * weights, f"{grown} of {weights}"
    assert grown["peak"] < (share + 0.2) * weights, "pages of the maps are given back while they are written"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_7b_checkpoint(tmp_path: Path, dtype: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", SHAPES["llama-2-7b"], dtype)
    assert cost(checkpoint, tmp_path, "optimize")["peak"] < 2 << 30


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_engine_of_1b(tmp_path: Path, dtype: str) -> None:
    """Built and opened: at most 1.3 times its weights."""
    sizes = SHAPES["tinyllama-1.1b"]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", sizes, dtype, seed=0)
    assert cost(checkpoint, tmp_path, "open")["peak"] < 1.3 * 4 * parameters(sizes)


LOWER = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from export_cost import Memory
import llmlab as ll
from llmlab.graph.lower.tensorrt import lower
graph = ll.optimize(ll.export(Path(sys.argv[2])))
memory = Memory()
memory.sample()
before, begin = memory.peaks["anonymous"], time.process_time()
parts = lower(graph, dialect=17, weak_type="float16").parts
memory.sample()
print(json.dumps({"parts": len(parts), "seconds": time.process_time() - begin, "grown": memory.peaks["anonymous"] - before}))
"""


@pytest.mark.slow
def test_a_7b_graph_is_lowered_without_its_weights(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", SHAPES["llama-2-7b"], "float16")
    command = [sys.executable, "-c", LOWER, str(BENCHMARKS), str(checkpoint)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["parts"] == 65 and found["seconds"] < 10 and found["grown"] < 200 << 20, found


QUANTIZE = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from export_cost import Memory
import llmlab as ll
graph = ll.optimize(ll.export(Path(sys.argv[2])))
memory = Memory()
memory.sample()
before, began = dict(memory.peaks), time.perf_counter()
quantized = ll.quantize(graph, sys.argv[4])
planned = time.perf_counter() - began
quantized.save(Path(sys.argv[3]) / "graph")
ll.build(ll.Graph.load(Path(sys.argv[3]) / "graph"), Path(sys.argv[3]) / "engine")
memory.sample()
print(json.dumps({"before": before, "planned": planned, "seconds": time.perf_counter() - began, **memory.peaks}))
"""


def quantizing_cost(checkpoint: Path, scratch: Path, recipe: str) -> dict[str, Any]:
    command = [sys.executable, "-c", QUANTIZE, str(BENCHMARKS), str(checkpoint), str(scratch), recipe]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_quantizing_takes_the_memory_of_a_weight(tmp_path: Path) -> None:
    """To the graph's folder and from there to an engine; half a byte a weight in both."""
    sizes = {**WIDE, "num_hidden_layers": 8}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", sizes, "bfloat16", shard_bytes=200 << 20, seed=0)
    found = quantizing_cost(checkpoint, tmp_path, "int4_rtn")
    largest = 2048 * 2 * 5632  # gate and up, joined
    assert found["anonymous"] - found["before"]["anonymous"] < 12 * largest, found
    assert found["planned"] < 30, "nothing is rounded before it is written"
    layers = parameters(sizes) - 2 * 4000 * 2048
    assert (tmp_path / "graph" / "weights.bin").stat().st_size < 1.02 * (layers * (0.5 + 4 / 32) + 2 * 2 * 4000 * 2048)


@pytest.mark.slow
def test_a_7b_model_is_quantized_in_little_memory(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", SHAPES["llama-2-7b"], "bfloat16")
    assert quantizing_cost(checkpoint, tmp_path, "int4_rtn_g128")["peak"] < 3 << 30
