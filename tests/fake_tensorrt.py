"""TensorRT and our kernels played by ONNX Runtime and NumPy behind the same interfaces, on `HostDriver`'s memory."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from fake_driver import installed
from host_driver import HostDriver, view
from lowered import dequantized, norm, product, rounded

from llmlab.kernels.attention import AttentionPointers
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.gpu.geometry import AttentionKind
from llmlab.kernels.norms import NormPointers
from llmlab.kernels.products import ProductPointers
from llmlab.kernels.reference import paged_attention
from llmlab.runtime.params import SamplingParams
from llmlab.runtime.sampler import draw
from llmlab.tensorrt.builder import Plan
from llmlab.tensorrt.library import Library

_NAMES = {"float16": "HALF", "bfloat16": "BF16", "float32": "FLOAT", "int32": "INT32", "int64": "INT64"}
_KINDS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32}
SCRATCH = 4096


class FakeLibrary(Library):
    """TensorRT 8.6 as far as building and running go, without a GPU."""

    def __init__(self, driver: HostDriver) -> None:
        heard = SimpleNamespace(text="", out_of_memory=False, clear=lambda: None)
        super().__init__(
            "tensorrt", SimpleNamespace(LayerInformationFormat=SimpleNamespace(JSON=None)), (8, 6, 1), None, heard
        )
        object.__setattr__(self, "driver", driver)
        object.__setattr__(self, "refuse", None)

    def hosting(self, wanted: str | None) -> Any:
        return wanted or "piecewise"

    @property
    def opset(self) -> Any:
        return 17

    def check_capabilities(self, wanted: Any) -> Any:
        return tuple(wanted)

    def require_gpu(self) -> Any:
        return None

    def load(self, plan: Any, where: str = "the plan") -> Any:
        return FakeEngine(self.driver, bytes(plan))

    def context(self, engine: Any) -> Any:
        return FakeContext(engine, self)

    def memory(self, engine: Any, profile: int) -> int:
        return SCRATCH

    def set_memory(self, context: Any, pointer: int, nbytes: int) -> None:
        context.scratch = pointer, nbytes


class FakeBuilder:
    """A plan is the part's ONNX file with what TensorRT would have been told of it."""

    fail_at: int | None = None

    def __init__(self, library: Library, config: Any, total: int = 1) -> None:
        self.config, self.built = config, 0

    def __enter__(self) -> FakeBuilder:
        return self

    def __exit__(self, *error: object) -> None: ...

    def build(
        self, onnx_path: Path, profiles: Any, *, name: str, key: str, weak: Any = None, plugin: bool = False
    ) -> Plan:
        if self.built == self.fail_at:
            raise KeyboardInterrupt
        self.built += 1
        model = onnx.load(onnx_path)
        io = {t.name: t.type.tensor_type.elem_type for t in (*model.graph.input, *model.graph.output)}
        types = {n: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(t)).name for n, t in io.items()}
        header = json.dumps({"types": {**types, **(weak.io if weak else {})}, "profiles": list(profiles)})
        return Plan(memoryview(header.encode() + b"\n" + model.SerializeToString()), "", 0.5)


class FakeEngine:
    def __init__(self, driver: HostDriver, plan: bytes) -> None:
        header, _, model = plan.partition(b"\n")
        facts = json.loads(header)
        self.model = model
        self.driver, self.types, self.profiles = driver, facts["types"], facts["profiles"]
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: _KINDS[i.type] for i in self.session.get_inputs()}
        sizes = {i.name: tuple(i.shape) for i in self.session.get_inputs()}
        self.fixed = {n: s for n, s in sizes.items() if all(isinstance(d, int) for d in s)}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.num_optimization_profiles = len(self.profiles)
        self.taken: set[int] = set()
        self.num_io_tensors = len(self.types)

    def create_engine_inspector(self) -> Any:
        layers = json.dumps({"Layers": [{"Name": n.name} for n in onnx.load_from_string(self.model).graph.node]})
        return SimpleNamespace(get_engine_information=lambda form: layers)

    def get_tensor_name(self, number: int) -> str:
        return list(self.types)[number]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=_NAMES[self.types[name]])

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return self.profiles[profile][name]


class FakeContext:
    """Shapes and addresses are what they are when it is enqueued, as in a CUDA graph."""

    def __init__(self, engine: FakeEngine, library: FakeLibrary) -> None:
        self.engine, self.library = engine, library
        self.shapes: dict[str, tuple[int, ...]] = dict(engine.fixed)
        self.addresses: dict[str, int] = {}
        self.scratch = 0, 0
        self.profile = -1

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        """False for a profile that another context of the engine has, as in TensorRT 8.6."""
        taken, self.profile = number in self.engine.taken, number
        self.engine.taken.add(number)
        return not taken

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profiles[self.profile][name]
        self.shapes[name] = tuple(shape)
        return all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address % 256 == 0

    def execute_async_v3(self, stream: int) -> bool:
        if self.library.refuse:  # type: ignore[attr-defined]
            return False
        shapes, addresses, (scratch, nbytes) = dict(self.shapes), dict(self.addresses), self.scratch

        def run() -> None:
            ctypes.memset(scratch, 0xA5, nbytes)
            types = {name: np.dtype(_plain(kind)) for name, kind in self.engine.types.items()}
            feeds = {n: view(addresses[n], shapes[n], types[n]).astype(k) for n, k in self.engine.inputs.items()}
            with np.errstate(all="ignore"):
                for name, array in zip(self.engine.outputs, self.engine.session.run(None, feeds), strict=True):
                    view(addresses[name], array.shape, types[name])[...] = array

        self.engine.driver.enqueue(run)
        return True


def _plain(name: str) -> Any:
    return ml_dtypes.bfloat16 if name == "bfloat16" else name


@dataclass(frozen=True)
class FakeVariant:
    """`AttentionVariant` in any type."""

    kind: AttentionKind
    dtype: str
    kv_dtype: str
    rotary: int
    interleaved: bool


class FakeLocator:
    def __init__(self, kernels: KernelSet, device: Any, block_size: int) -> None:
        pass

    def enqueue(self, stream: Any, *, slots: int, tokens: int, **others: int) -> None:
        pass


def fake_attention(driver: HostDriver) -> type:
    """`PagedAttention` on the NumPy reference. Rows that no sequence owns are left as they are."""

    class Attention:
        def __init__(self, kernels: KernelSet, device: Any, variant: Any, scale: float) -> None:
            self.variant, self.scale = variant, scale

        def enqueue(
            self,
            stream: Any,
            pointers: AttentionPointers,
            *,
            tokens: int,
            batch: int,
            decode: bool,
            splits: int,
            table_stride: int,
            blocks: int,
        ) -> None:
            p = AttentionPointers(**vars(pointers))
            driver.enqueue(lambda: self.run(p, tokens, batch, decode, splits, table_stride, blocks))

        def run(self, p: Any, tokens: int, batch: int, decode: bool, splits: int, stride: int, blocks: int) -> None:
            kind, dtype = self.variant.kind, np.dtype(_plain(self.variant.dtype))
            start = view(p.query_start, (batch + 1,), np.int32)
            new = np.diff(start)
            real = np.flatnonzero(new)
            count = int(start[-1])
            assert count <= tokens and (not decode or new.max(initial=0) <= 1)
            assert splits or not (new == 1).any(), "decoding sequences, and no kernel for them"
            width, kv_width = kind.num_heads * kind.head_dim, kind.kv_heads * kind.head_dim
            pool = view(
                p.pool, (2, blocks, kind.kv_heads, kind.block_size, kind.head_dim), _plain(self.variant.kv_dtype)
            )
            positions = view(p.position_ids, (tokens,), np.int32)[:count]
            tables = {}
            for name in ("cos", "sin"):
                if self.variant.rotary:
                    rows = int(positions.max()) + 1
                    tables[name] = view(getattr(p, name), (rows, self.variant.rotary // 2), np.float32)
            for name in ("alibi_slopes", "sinks"):
                if getattr(p, name):
                    tables[name] = view(getattr(p, name), (kind.num_heads,), np.float32)
            for name in ("k_scale", "v_scale") if kind.quantized else ():
                tables[name] = view(getattr(p, name), (kind.kv_heads,), np.float32)
            out, pool[...] = paged_attention(
                view(p.q, (count, width), dtype, p.q_stride),
                view(p.k, (count, kv_width), dtype, p.k_stride),
                view(p.v, (count, kv_width), dtype, p.v_stride),
                pool,
                np.append(0, np.cumsum(new[real])).astype(np.int32),
                view(p.kv_len, (batch,), np.int32)[real],
                view(p.block_table, (batch, stride), np.int32)[real],
                positions,
                **tables,
                num_heads=kind.num_heads,
                kv_num_heads=kind.kv_heads,
                head_dim=kind.head_dim,
                scale=self.scale,
                window=kind.window,
                softcap=kind.softcap,
                interleaved=self.variant.interleaved,
            )
            view(p.out, (tokens, width), dtype)[:count] = out

    return Attention


def fake_product(driver: HostDriver) -> type:
    """`Product` in NumPy."""

    class Product:
        def __init__(self, kernels: KernelSet, device: Any, kind: Any) -> None:
            self.kind = kind

        def scratch_bytes(self, rows: int) -> int:
            return rows * (self.kind.depth + 4) if self.kind.x else 0

        def enqueue(self, stream: Any, pointers: ProductPointers, *, rows: int) -> None:
            p = ProductPointers(**vars(pointers))
            driver.enqueue(lambda: self.run(p, rows))

        def run(self, p: ProductPointers, rows: int) -> None:
            kind = self.kind
            dtype, out_dtype = (_plain(name) for name in (kind.dtype, kind.out_dtype))
            x = view(p.x, (rows, kind.depth), dtype, p.x_stride)
            if kind.scale_shape is None:
                weight = view(p.weight, (kind.outputs, kind.depth), dtype)
            else:
                stored, scale = view(p.weight, kind.weight_shape, np.int8), view(p.scale, kind.scale_shape, np.float16)
                weight = dequantized(stored, scale, kind.bits, kind.depth, kind.group, packed=not kind.x)
            if kind.x:
                assert p.scratch
                view(p.scratch, (rows * (kind.depth + 4),), np.uint8)[...] = 0xA5
                x = rounded(x)
            bias = view(p.bias, (kind.outputs,), dtype) if kind.bias else None
            add = view(p.add, (rows, kind.width), dtype) if kind.add else None
            with np.errstate(all="ignore"):
                view(p.out, (rows, kind.width), out_dtype)[...] = product(x, weight, kind.gate, bias, add)

    return Product


def fake_norm(driver: HostDriver) -> type:
    """`RowNorm` in NumPy."""

    class Norm:
        def __init__(self, kernels: KernelSet, device: Any, kind: Any) -> None:
            self.kind = kind

        def enqueue(self, stream: Any, pointers: NormPointers, *, rows: int) -> None:
            p = NormPointers(**vars(pointers))
            driver.enqueue(lambda: self.run(p, rows))

        def run(self, p: NormPointers, rows: int) -> None:
            kind = self.kind
            x = view(p.x, (rows, kind.width), _plain(kind.dtype), p.x_stride)
            weight = view(p.weight, (kind.width,), _plain(kind.weight_dtype))
            with np.errstate(all="ignore"):
                view(p.out, (rows, kind.width), _plain(kind.out_dtype))[...] = norm(x, weight, kind.epsilon)

    return Norm


def fake_sampler(driver: HostDriver) -> type:
    """`TokenSampler` on `runtime.sampler.draw`."""

    class Sampler:
        def __init__(self, kernels: KernelSet, device: Any, vocab: int) -> None:
            self.vocab = vocab

        def scratch_bytes(self, rows: int) -> int:
            return 16

        def enqueue(self, stream: Any, pointers: Any, *, rows: int, drawn: bool) -> None:
            driver.enqueue(lambda: self.run(pointers, rows, drawn))

        def run(self, p: Any, rows: int, drawn: bool) -> None:
            logits = view(p.logits, (rows, self.vocab), np.float32)
            tokens = view(p.tokens, (rows,), np.int32)
            names = ("temperature", "top_p", "min_p", "uniform")
            chosen = {name: view(getattr(p, name), (rows,), np.float32) for name in names}
            top_k = view(p.top_k, (rows,), np.int32)
            for row in range(rows):
                best = int(logits[row].argmax())
                tokens[row] = best if np.isfinite(logits[row, best]) else -1
                temperature = float(chosen["temperature"][row])
                if tokens[row] >= 0 and temperature > 0:
                    assert drawn
                    params = SamplingParams(
                        temperature=temperature,
                        top_k=int(top_k[row]),
                        top_p=float(chosen["top_p"][row]),
                        min_p=float(chosen["min_p"][row]),
                    )
                    tokens[row] = draw(logits[row], logits[row, best], params, float(chosen["uniform"][row]))

    return Sampler


def fake_feed(driver: HostDriver) -> type:
    class Feed:
        def __init__(self, kernels: KernelSet, device: Any) -> None:
            pass

        def enqueue(self, stream: Any, *, ids: int, previous: int, count: int) -> None:
            def run() -> None:
                given = view(ids, (count,), np.int32)
                for at in np.flatnonzero(given < 0):
                    given[at] = max(int(view(previous, (-given[at],), np.int32)[-1]), 0)

            driver.enqueue(run)

    return Feed


@contextmanager
def fake_gpu(free: int = 1 << 30, capability: tuple[int, int] = (9, 0)) -> Iterator[SimpleNamespace]:
    """A machine with TensorRT 8.6 and a GPU of `free` bytes, all of it played: `.driver`, `.library`."""
    driver = HostDriver(free, capability)
    library = FakeLibrary(driver)
    gpu = SimpleNamespace(name="Fake GPU", compute_capability=capability, cuda=(13, 0))
    runtime = "llmlab.runtime.backends.tensorrt"
    with pytest.MonkeyPatch.context() as patch, installed(driver):
        patch.setattr("llmlab.build_tensorrt.resolve", lambda kind: library)
        patch.setattr("llmlab.build_tensorrt.visible_gpu", lambda: gpu)
        patch.setattr("llmlab.build_tensorrt.PlanBuilder", FakeBuilder)
        patch.setattr(f"{runtime}.open.resolve", lambda kind: library)
        patch.setattr(f"{runtime}.attention.AttentionVariant", FakeVariant)
        patch.setattr(f"{runtime}.attention.PagedAttention", fake_attention(driver))
        patch.setattr(f"{runtime}.attention.TokenLocator", FakeLocator)
        patch.setattr(f"{runtime}.rows.Product", fake_product(driver))
        patch.setattr(f"{runtime}.rows.RowNorm", fake_norm(driver))
        patch.setattr(f"{runtime}.tokens.TokenSampler", fake_sampler(driver))
        patch.setattr(f"{runtime}.tokens.TokenFeed", fake_feed(driver))
        yield SimpleNamespace(driver=driver, library=library)


NO_KERNELS = KernelSet(())
