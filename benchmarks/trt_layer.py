"""A Llama layer without its attention, built and run by TensorRT: build times, error, microseconds, and what is inside.

    python benchmarks/trt_layer.py write FOLDER [--hidden 4096 --ffn 11008]   # needs onnx, no GPU
    python benchmarks/trt_layer.py run FOLDER [--level 2] [--refit] [--json FILE]       # needs a GPU and TensorRT, no onnx

Two files with one key and other weights are written, so that the second build shows what the shared timing cache saves.
Each decode bucket is checked against float32 in NumPy and timed as a captured CUDA graph of ten launches.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from llmlab.cuda import Device, DeviceBuffer, Event, Stream
from llmlab.errors import EngineError
from llmlab.tensorrt.builder import PlanBuilder
from llmlab.tensorrt.config import BuildConfig
from llmlab.tensorrt.inspect import LayerTimes, summary_of
from llmlab.tensorrt.installed import Kind
from llmlab.tensorrt.library import Library, resolve
from llmlab.tensorrt.precision import WeakTyping
from llmlab.tensorrt.refit import refit

BUCKETS, TOKENS = (1, 8, 64), 512
_HELD = ("square", "mean", "stable", "root", "norm", "scaled")
_ONNX = """<ir_version: 8, opset_import: ["": 17]>
layer (float[T, H] attended, float[T, H] x) => (float[T, H] y, float[T, Q] qkv) {{
    two = Constant<value_float = 2.0>()
    epsilon = Constant<value_float = 1e-5>()
    [out] projected = MatMul(attended, w_out)
    [add] r = Add(x, projected)
    {first}
    [gate_up] both = MatMul(scaled1, w_gate_up)
    [split] gate, up = Split<axis = 1>(both)
    [sigmoid] sigmoid = Sigmoid(gate)
    [silu] silu = Mul(gate, sigmoid)
    [product] product = Mul(silu, up)
    [down] down = MatMul(product, w_down)
    [residual] y = Add(r, down)
    {second}
    [qkv] qkv = MatMul(scaled2, w_qkv)
}}"""
_NORM = """[square{n}] square{n} = Pow({x}, two)
    [mean{n}] mean{n} = ReduceMean<axes = [-1], keepdims = 1>(square{n})
    [stable{n}] stable{n} = Add(mean{n}, epsilon)
    [root{n}] root{n} = Sqrt(stable{n})
    [norm{n}] norm{n} = Div({x}, root{n})
    [scaled{n}] scaled{n} = Mul(norm{n}, w_norm{n})"""


def make_weights(hidden: int, ffn: int, seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    shapes = {
        "w_out": (hidden, hidden),
        "w_gate_up": (hidden, 2 * ffn),
        "w_down": (ffn, hidden),
        "w_qkv": (hidden, 3 * hidden),
    }
    weights = {n: random.standard_normal(s, np.float32) / np.float32(np.sqrt(s[0])) for n, s in shapes.items()}
    return weights | {f"w_norm{n}": 1 + 0.1 * random.standard_normal(hidden, np.float32) for n in (1, 2)}


def write(folder: Path, hidden: int, ffn: int) -> None:
    import onnx
    from onnx import numpy_helper

    folder.mkdir(parents=True, exist_ok=True)
    text = _ONNX.format(first=_NORM.format(n=1, x="r"), second=_NORM.format(n=2, x="y"))
    for seed in range(2):
        model = onnx.parser.parse_model(text)
        for value in (*model.graph.input, *model.graph.output):
            width = value.type.tensor_type.shape.dim[1]
            width.dim_value = {"H": hidden, "Q": 3 * hidden}[width.dim_param]
        weights = make_weights(hidden, ffn, seed)
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
        path, data = folder / f"layer{seed}.onnx", f"layer{seed}.bin"
        (folder / data).unlink(missing_ok=True)
        onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=0)
    (folder / "sizes.json").write_text(json.dumps({"hidden": hidden, "ffn": ffn}))


def reference(w: dict[str, Any], attended: Any, x: Any) -> tuple[Any, Any]:
    """The layer in float32."""

    def norm(value: Any, weight: Any) -> Any:
        return value / np.sqrt(np.mean(value * value, axis=-1, keepdims=True) + 1e-5) * weight

    r = x + attended @ w["w_out"]
    gate, up = np.split(norm(r, w["w_norm1"]) @ w["w_gate_up"], 2, axis=1)
    y = r + (gate / (1 + np.exp(-gate)) * up) @ w["w_down"]
    return y, norm(y, w["w_norm2"]) @ w["w_qkv"]


class Running:
    """An open engine with its tensors in device memory."""

    def __init__(self, library: Library, engine: Any, widths: dict[str, int]) -> None:
        self.library, self.engine, self.widths = library, engine, widths
        self.stream = Stream()
        self.buffers = {name: DeviceBuffer(TOKENS * width * 2, name) for name, width in widths.items()}
        profiles = range(engine.num_optimization_profiles)
        self.scratch = DeviceBuffer(max(library.memory(engine, p) for p in profiles), "scratch")

    def context(self, profile: int, rows: int) -> Any:
        context = self.library.context(self.engine)
        self.library.set_memory(context, self.scratch.pointer, self.scratch.nbytes)
        assert context.set_optimization_profile_async(profile, int(self.stream)), self.library.heard.text
        for name, buffer in self.buffers.items():
            assert context.set_tensor_address(name, buffer.pointer), self.library.heard.text
        for name in ("attended", "x"):
            assert context.set_input_shape(name, (rows, self.widths[name])), self.library.heard.text
        return context

    def error(self, context: Any, weights: dict[str, Any], rows: int) -> float:
        """‖out − reference‖ / ‖reference‖, the larger one of both outputs, from poisoned outputs."""
        random = np.random.default_rng(rows)
        given = [random.standard_normal((rows, self.widths[n])).astype(np.float16) for n in ("attended", "x")]
        for name, array in zip(("attended", "x"), given, strict=True):
            self.buffers[name].upload(array)
        for name in ("y", "qkv"):
            self.buffers[name].fill_byte(0xFF, self.stream)
        assert context.execute_async_v3(int(self.stream)), self.library.heard.text
        self.stream.synchronize()
        expected = reference(weights, *(array.astype(np.float32) for array in given))
        found = [self.buffers[n].to_numpy(np.float16, (rows, self.widths[n])).astype(np.float32) for n in ("y", "qkv")]
        return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, expected, strict=True))

    def microseconds(self, context: Any, launches: int = 10, replays: int = 50) -> float:
        with self.stream.capture() as graph:
            for _ in range(launches):
                assert context.execute_async_v3(int(self.stream)), self.library.heard.text
        start, end = Event(), Event()
        for _ in range(3):
            graph.launch(self.stream)
        start.record(self.stream)
        for _ in range(replays):
            graph.launch(self.stream)
        end.record(self.stream)
        end.synchronize()
        return end.elapsed_ms(start) * 1000 / launches / replays


def run(folder: Path, target: Kind, level: int | None, also_refit: bool) -> dict[str, Any]:
    sizes = json.loads((folder / "sizes.json").read_text())
    hidden, ffn = sizes["hidden"], sizes["ffn"]
    widths = {"attended": hidden, "x": hidden, "y": hidden, "qkv": 3 * hidden}
    device, library = Device.open(), resolve(target)
    config = BuildConfig(max_batch=64, max_tokens_per_step=TOKENS, decode_buckets=BUCKETS, optimization_level=level)
    weak = WeakTyping(dict.fromkeys(widths, "float16"), [f"{name}{n}" for n in (1, 2) for name in _HELD])
    profiles = config.profiles(dict.fromkeys(("attended", "x"), ("T", hidden)))
    print(
        f"{library} on {device.name}: hidden {hidden}, ffn {ffn}, level {level}, buckets {BUCKETS}, up to {TOKENS}",
        flush=True,
    )
    plans = []
    with PlanBuilder(library, config, total=2) as builder:
        for seed in range(2):
            plans.append(
                builder.build(folder / f"layer{seed}.onnx", profiles, name=f"layer {seed}", key="layer", weak=weak)
            )
            print(f"build {seed}: {plans[-1].seconds:.1f} s, {plans[-1].data.nbytes / 1e6:.0f} MB", flush=True)
    start = time.perf_counter()
    engine = library.load(plans[1].data)
    running = Running(library, engine, widths)
    print(f"loaded in {time.perf_counter() - start:.2f} s, scratch {running.scratch.nbytes / 1e6:.1f} MB")
    weights = make_weights(hidden, ffn, 1)
    parameters = sum(value.size for value in weights.values())
    rows: list[dict[str, Any]] = []
    for profile, tokens in enumerate((*BUCKETS, TOKENS)):
        context = running.context(profile, tokens)
        error = running.error(context, weights, tokens)
        wrong = running.error(context, make_weights(hidden, ffn, 0), tokens)
        us = running.microseconds(context)
        rows.append({"tokens": tokens, "error": error, "us": us, "tb_per_s": 2 * parameters / us / 1e6})
        print(
            f"{tokens:4} tokens: {us:8.1f} us, {rows[-1]['tb_per_s']:.2f} TB/s of fp16 weights, error {error:.1e} (of other weights {wrong:.1e})"
        )
        assert error <= 2e-3 < wrong, "the engine computes something else"
    times = LayerTimes(library)
    context = running.context(0, 1)
    with times.watch(context):
        for _ in range(20):
            assert context.execute_async_v3(int(running.stream))
            running.stream.synchronize()
    for name, ms, calls in times.rows()[:12]:
        print(f"  {ms * 1000:8.1f} us x{calls}  {name[:110]}")
    facts = summary_of(library, engine)
    print(f"{facts.layers} layers: {facts.kinds}; types {facts.types}; {len(facts.profiles)} profiles")
    try:
        library.load(bytes(plans[0].data[: len(plans[0].data) // 2]), "half a plan")
        raise AssertionError("half a plan was loaded")
    except EngineError as refused:
        print(f"refused: {refused}")
    refitted = refit_other(library, folder, profiles, weak, running) if also_refit else None
    return {
        "library": str(library),
        "gpu": device.name,
        **sizes,
        "level": level,
        "builds": [p.seconds for p in plans],
        "rows": rows,
        "refit": refitted,
    }


def refit_other(library: Library, folder: Path, profiles: Any, weak: WeakTyping, running: Running) -> dict[str, float]:
    """Layer 0 built to be refitted, then given the weights of layer 1."""
    config = BuildConfig(
        max_batch=64, max_tokens_per_step=TOKENS, decode_buckets=BUCKETS, optimization_level=1, refit=True
    )
    with PlanBuilder(library, config) as builder:
        plan = builder.build(folder / "layer0.onnx", profiles, name="refittable layer 0", weak=weak)
    weights = make_weights(running.widths["x"], json.loads((folder / "sizes.json").read_text())["ffn"], 1)
    other = Running(library, library.load(plan.data), running.widths)
    start = time.perf_counter()
    refit(library, other.engine, weights)
    seconds = time.perf_counter() - start
    context = other.context(0, 1)
    found = {
        "build_s": plan.seconds,
        "refit_s": seconds,
        "error": other.error(context, weights, 1),
        "us": other.microseconds(context),
    }
    print(
        f"refit: built in {plan.seconds:.1f} s, other weights in {seconds:.2f} s, error {found['error']:.1e}, {found['us']:.1f} us at 1 token"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("write", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=11008)
    parser.add_argument("--level", type=int)
    parser.add_argument("--refit", action="store_true", help="build one more that can be refitted, and refit it")
    parser.add_argument("--target", default="tensorrt", choices=("tensorrt", "tensorrt-rtx"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.step == "write":
        write(args.folder, args.hidden, args.ffn)
        return
    result = run(args.folder, args.target, args.level, args.refit)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
