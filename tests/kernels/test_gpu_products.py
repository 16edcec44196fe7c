"""The product kernels against NumPy in float64: on the GPU where there is one, else under Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'llmlab[tensorrt]'", allow_module_level=True)
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

from llmlab.errors import InputError  # noqa: E402 (the interpreter is chosen when triton is imported)
from llmlab.kernels.activations import ACTIVATIONS  # noqa: E402
from llmlab.kernels.gpu.launch_product import ProductKind, Tile, Vector, widens  # noqa: E402
from llmlab.kernels.gpu.start_product import start_product, start_quantize, start_widen  # noqa: E402
from llmlab.kernels.packing import pack_weight  # noqa: E402


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teach Triton's interpreter, which keeps bfloat16 as integers, to multiply them and to make them of integers."""
    if DEVICE == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def wide(self: Any, value: Any) -> Any:
        return cast(self, value, tl.float32) if value.dtype.scalar == tl.bfloat16 else value

    def cast_impl(self: Any, value: Any, to: Any) -> Any:
        if to.scalar == tl.bfloat16 and value.dtype.scalar.is_int():
            value = cast(self, value, tl.float32)
        return cast(self, value, to)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, wide(self, a), wide(self, b), *others)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


TOLERANCE = {"float16": 2e-3, "bfloat16": 1.5e-2, "float32": 1e-4}  # of any element, beside the largest of its row
HALF = ProductKind(144, 72, "float16", "float16", "float16")
INT8 = replace(HALF, weight="int8")
INT4 = replace(HALF, depth=160, weight="int4")


def tolerance(kind: ProductKind, rows: int) -> float:
    """A weight in groups that is made wide is rounded to the type of x."""
    rounded = TOLERANCE[kind.dtype] if widens(kind, rows) and kind.group else 0.0
    return max(TOLERANCE[kind.out_dtype], rounded)


@dataclass
class Case:
    """Tensors of one product and, in float64, what comes of them."""

    kind: ProductKind
    x: Any
    weight: Any
    scale: Any
    bias: Any
    add: Any
    x_scale: Any
    expected: np.ndarray

    def error(self, cut: Vector | Tile | None = None) -> float:
        """The largest error of an element, beside the largest of its row; infinite where something wasn't written."""
        out = torch.full(self.expected.shape, torch.nan, dtype=getattr(torch, self.kind.out_dtype), device=DEVICE)
        start_product(self.kind, out, self.x, self.weight, self.scale, self.bias, self.add, self.x_scale, cut)
        found = out.double().cpu().numpy()
        if not np.isfinite(found).all():
            return float("inf")
        return float((np.abs(found - self.expected).max(1) / np.abs(self.expected).max(1)).max())

    def right(self, cut: Vector | Tile | None = None) -> bool:
        return self.error(cut) < tolerance(self.kind, 1 if cut else len(self.expected))


def case(kind: ProductKind, rows: int, seed: int = 0) -> Case:
    """x is a view of a wider tensor whose other columns are NaN."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Any:
        return torch.tensor(rng.standard_normal(shape), dtype=getattr(torch, kind.dtype))

    wide = torch.full((rows, kind.depth + 32), torch.nan, dtype=getattr(torch, kind.dtype))
    x = wide[:, 16 : 16 + kind.depth]
    x.copy_(draw(rows, kind.depth))
    bias, add = draw(kind.outputs) if kind.bias else None, draw(rows, kind.width) if kind.add else None
    scale = None
    if kind.bits == 16:
        weight = draw(kind.outputs, kind.depth)
        real = weight.double().numpy()
    else:
        least = -(2 ** (kind.bits - 1))
        values = rng.integers(least, -least, (kind.outputs, kind.depth))
        values[0, :2] = least, -least - 1
        scale = torch.tensor(rng.uniform(0.5, 2, kind.scale_shape) / -least, dtype=torch.float16)
        weight = torch.tensor(pack_weight(kind, values.astype(np.int8)))
        each = kind.depth // kind.group if kind.group else 1
        real = values * np.repeat(scale.double().numpy().reshape(kind.outputs, each), kind.depth // each, 1)
    real_x, x_scale = x.double().numpy(), None
    if kind.x:
        steps = np.abs(real_x).max(1, keepdims=True).astype(np.float32) / np.float32(127)
        if kind.x == "int8_static":
            steps[:] = x_scale = np.float32(0.02)  # what is beyond 2.54 is cut off
        real_x = np.rint(real_x.astype(np.float32) / steps).clip(-127, 127).astype(np.float64) * steps
    expected = real_x @ real.T
    if bias is not None:
        expected = expected + bias.double().numpy()
    if kind.gate:
        expected = ACTIVATIONS[kind.gate](expected[:, : kind.width], 1.0) * expected[:, kind.width :]
    if add is not None:
        expected = expected + add.double().numpy()
    x_scale = None if x_scale is None else torch.tensor([x_scale])
    given = (wide.to(DEVICE)[:, 16 : 16 + kind.depth], weight, scale, bias, add, x_scale)
    return Case(kind, *(None if t is None else t.to(DEVICE) for t in given), expected)


KINDS = {
    "float16": HALF,
    "bfloat16": replace(HALF, dtype="bfloat16", out_dtype="bfloat16", weight="bfloat16"),
    "int8": INT8,
    "int8 in groups": replace(INT8, depth=192, group=64),
    "int4": INT4,
    "int4 in groups": replace(INT4, depth=192, group=64),
    "int4 in groups of 128, bfloat16": replace(INT4, depth=256, group=128, dtype="bfloat16", out_dtype="bfloat16"),
    "float16, bias, residual": replace(HALF, bias=True, add=True),
    "float16, everything": replace(HALF, gate="silu", bias=True, add=True, out_dtype="float32"),
    "int8, everything": replace(INT8, gate="gelu", bias=True, add=True, out_dtype="bfloat16"),
    "int4 in groups, everything": replace(
        INT4, depth=192, group=64, gate="gelu_tanh", bias=True, add=True, out_dtype="float32"
    ),
    "int8 by int8": replace(INT8, x="int8"),
    "int8 by int8, everything": replace(INT8, x="int8", gate="silu", bias=True, add=True, out_dtype="float32"),
    "int8 by int8 of one scale, bfloat16": replace(INT8, x="int8_static", dtype="bfloat16", out_dtype="bfloat16"),
    "bfloat16 and int8, relu": replace(INT8, dtype="bfloat16", gate="relu", out_dtype="float32"),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
nightly = () if DEVICE == "cuda" else pytest.mark.slow


@every_kind
@pytest.mark.parametrize("rows", [17, 65, *(pytest.param(n, marks=nightly) for n in (5, 16, 63, 64, 130))])
def test_a_product_with_tensor_cores(kind: ProductKind, rows: int) -> None:
    assert case(kind, rows).right()


@every_kind
@pytest.mark.parametrize("rows", [1, 2, pytest.param(4, marks=nightly)])
def test_a_product_of_few_rows(kind: ProductKind, rows: int) -> None:
    assert case(replace(kind, width=5), rows).right(Vector(rows, 2, 1))


@every_kind
@pytest.mark.parametrize("swap", [False, True])
def test_either_operand_may_be_on_the_left(kind: ProductKind, swap: bool) -> None:
    assert case(kind, 37).right(Tile(32, 32, 32, 4, 2, swap))


@pytest.mark.parametrize(
    "kind",
    [
        replace(INT8, depth=2080),
        replace(INT4, depth=2080),
        replace(INT4, depth=2112, group=64),
        replace(INT8, depth=192, group=64, dtype="bfloat16", out_dtype="bfloat16"),
    ],
    ids=["int8", "int4", "int4 in groups", "int8 in groups, bfloat16"],
)
def test_a_weight_made_wide(kind: ProductKind) -> None:
    """Integers where a row has one scale, else each value rounded once."""
    rng = np.random.default_rng(0)
    most = 2 ** (kind.bits - 1)
    kind = replace(kind, width=3, gate="silu")
    values = torch.tensor(rng.integers(-most, most, (6, kind.depth)), dtype=torch.int8)
    scale = torch.tensor(rng.uniform(0.01, 1, kind.scale_shape), dtype=torch.float16)
    found = start_widen(kind, torch.tensor(pack_weight(kind, values.numpy())).to(DEVICE), scale.to(DEVICE)).cpu()
    expected = values.float()
    if kind.group:
        expected = expected * scale.float().repeat_interleave(kind.group, 1)
    near = 2**-7 if kind.dtype == "bfloat16" and DEVICE == "cpu" else 0  # which the interpreter rounds down
    assert torch.allclose(found.float(), expected.to(found.dtype).float(), rtol=near, atol=0)


WHOLE = KINDS["int8, everything"]


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("what", ["scale", "bias", "add", "weight", "x"])
def test_a_neighbour_in_place_of_what_was_given_is_seen(what: str, rows: int) -> None:
    given = case(replace(WHOLE, width=24), rows)
    assert given.right()
    axis = 0 if what in ("scale", "bias") else 1  # of add the next column, of x and W what others multiply
    assert not replace(given, **{what: getattr(given, what).roll(1, axis)}).right()


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("group", [0, 64])
def test_the_halves_of_a_byte_are_told_apart_and_so_are_groups(rows: int, group: int) -> None:
    given = case(replace(INT4, depth=192, width=8, group=group), rows)
    assert given.right()
    swapped = (given.weight << 4) | ((given.weight >> 4) & 15)  # columns that are 8 apart
    assert not replace(given, weight=swapped).right()
    if group:
        assert not replace(given, scale=given.scale.roll(1, 1)).right()


@pytest.mark.parametrize("rows", [1, 20])
def test_a_missing_residual_or_gate_is_seen(rows: int) -> None:
    given = case(replace(WHOLE, width=8), rows)
    for without in ({"add": False}, {"bias": False}, {"gate": "silu"}):
        assert not replace(given, kind=replace(given.kind, **without)).right()


@pytest.mark.parametrize("rows", [1, 20])
def test_what_is_not_a_number_stays_so(rows: int) -> None:
    given = case(replace(HALF, width=8, gate="relu"), rows)
    given.x[0, 3] = torch.nan
    out = torch.zeros(rows, 8, dtype=torch.float16, device=DEVICE)
    start_product(given.kind, out, given.x, given.weight)
    assert torch.isnan(out[0]).all() and not torch.isnan(out[1:]).any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"depth": 100},
        {"weight": "int4", "depth": 144},
        {"x": "int8"},
        {"x": "int4", "weight": "int8"},
        {"x": "int8", "weight": "int8", "depth": 128, "group": 32},
        {"weight": "bfloat16"},
        {"dtype": "float32"},
        {"out_dtype": "int8"},
        {"weight": "int8", "group": 48},
        {"weight": "int8", "group": 128},
        {"group": 32},
        {"gate": "sigmoid"},
        {"weight": "int8", "scaled": True},
        {"width": 0},
    ],
)
def test_what_there_are_no_kernels_for_is_refused_in_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"no kernels for the product ProductKind.*expected") as caught:
        replace(HALF, **wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("x", ["int8", "int8_static"])
def test_rows_become_integers(x: str) -> None:
    kind = replace(INT8, x=x)
    rows = torch.randn(5, kind.depth, dtype=torch.float16)
    rows[1] = 0
    rows[2, 7] = 500
    rows[3, 9], rows[4, 9] = torch.nan, torch.inf
    step = torch.tensor([0.02])
    values, scale = (t.cpu() for t in start_quantize(kind, rows.to(DEVICE), step.to(DEVICE)))
    wanted = step.expand(5) if x == "int8_static" else torch.stack([r.float().abs().max() / 127 for r in rows])
    if x == "int8":
        wanted[1] = 1
    assert torch.isnan(scale[3:]).all() and torch.allclose(scale[:3], wanted[:3])
    expected = (rows[:3].float() / scale[:3, None]).round().clamp(-127, 127)
    assert (values[:3] == expected).all()
    assert values[2, 7] == 127


def test_packed_integers_lie_eight_columns_apart() -> None:
    values = np.arange(32, dtype=np.int8)[None] - 16
    words = pack_weight(replace(INT8, depth=32), values).view(np.int16)[0]
    assert [int(w) & 255 for w in words[:8]] == [v & 255 for v in range(-16, -8)]
    assert [int(w) >> 8 for w in words[:8]] == list(range(-8, 0)) and int(words[8]) == 8 << 8
    small = pack_weight(replace(INT4, depth=32), values >> 1).view(np.uint16)[0]
    assert [[(int(w) >> 4 * n & 15) for n in range(4)] for w in small[:2]] == [[8, 12, 0, 4], [8, 12, 0, 4]]
    assert pack_weight(replace(INT8, x="int8", depth=32), values) is values
