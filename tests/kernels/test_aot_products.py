"""Products from kernels compiled ahead of time: what is launched, on a stand-in for the driver; what comes out, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_driver import FakeDriver, Launch, installed
from fake_kernels import launched_constants, record, uncompiled, values
from test_gpu_products import DEVICE, HALF, INT4, INT8, KINDS, Case, case, tolerance

from llmlab.cuda import Device, Stream
from llmlab.errors import EngineError
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.compile import SHARED_LIMITS, compile_kernels
from llmlab.kernels.gpu.launch_product import ROW_CLASSES, ProductKind, Tile, multiplied, tile
from llmlab.kernels.product_sources import product_sources
from llmlab.kernels.products import Product, ProductPointers

POINTERS = ProductPointers(
    **{
        name: 160 if name == "x_stride" else 0x7F00_0000_0000 + (n << 32)
        for n, name in enumerate(ProductPointers.__dataclass_fields__)
    }
)
WHOLE = replace(INT4, depth=192, group=64, gate="silu", bias=True, add=True)


class Launched:
    """Products whose launches are recorded."""

    def __init__(self, fake: FakeDriver) -> None:
        self.kernels = KernelSet(())
        self.fake, self.device = fake, Device.open()

    def product(self, kind: ProductKind, max_rows: int = 4096) -> Product:
        self.kernels += uncompiled(product_sources(kind, max_rows))
        record(self.fake, self.kernels)
        return Product(self.kernels, self.device, kind)

    def enqueue(self, product: Product, rows: int, pointers: ProductPointers = POINTERS) -> Launch:
        self.fake.launches.clear()
        product.enqueue(77, pointers, rows=rows)
        (launch,) = self.fake.launches
        return launch

    def values(self, launch: Launch) -> dict[str, Any]:
        return values(launch, self.kernels)


@pytest.fixture
def launched() -> Iterator[Launched]:
    with installed(FakeDriver()) as fake:
        yield Launched(fake)


def test_one_launch_whatever_the_rows_on_the_stream_that_was_given(launched: Launched) -> None:
    product = launched.product(HALF)
    few, many = launched.enqueue(product, 2), launched.enqueue(product, 300)
    assert (few.kernel, many.kernel) == ("product_rows", "product_tiles")
    assert few.stream == many.stream == 77
    assert launched.values(few)["rows"] == 2 and launched.values(many)["rows"] == 300
    launched.fake.launches.clear()
    product.enqueue(77, POINTERS, rows=0)
    assert not launched.fake.launches


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_every_kernel_gets_the_addresses_and_sizes_that_were_given(launched: Launched, rows: int) -> None:
    given = {name: value for name, value in vars(POINTERS).items() if name not in ("x_scale", "scratch")}
    expected = {**given, "rows": rows, "depth": WHOLE.depth, "width": WHOLE.width}
    assert launched.values(launched.enqueue(launched.product(WHOLE), rows)) == expected
    plain = launched.values(launched.enqueue(launched.product(HALF), rows))
    assert plain.keys() == expected.keys() - {"scale", "bias", "add"}


@pytest.mark.parametrize("x", ["int8", "int8_static"])
@pytest.mark.parametrize("rows", [1, 100])
def test_x_is_made_int8_in_scratch_and_multiplied_from_there(launched: Launched, rows: int, x: str) -> None:
    product = launched.product(replace(INT8, x=x))
    product.enqueue(77, POINTERS, rows=rows)
    first, second = launched.fake.launches
    assert (first.kernel, first.grid, first.stream) == ("quantize_rows", (rows, 1, 1), 77)
    at = {"values": POINTERS.scratch, "scale": POINTERS.scratch + rows * INT8.depth}
    given = {"given": POINTERS.x_scale} if x == "int8_static" else {}
    sizes = {"x": POINTERS.x, "x_stride": POINTERS.x_stride, "depth": INT8.depth}
    assert launched.values(first) == {**at, **given, **sizes}
    multiplied = launched.values(second)
    assert (multiplied["x"], multiplied["x_scale"]) == (at["values"], at["scale"])
    assert multiplied["x_stride"] == INT8.depth and multiplied["rows"] == rows
    assert product.scratch_bytes(rows) == rows * INT8.depth + 4 * rows
    assert launched.product(INT8).scratch_bytes(rows) == 0


@pytest.mark.parametrize("kind", [WHOLE, replace(INT8, depth=3008)], ids=["in groups", "one scale a row"])
def test_many_rows_are_multiplied_beside_a_weight_made_wide_in_scratch(launched: Launched, kind: ProductKind) -> None:
    product = launched.product(kind)
    product.enqueue(77, POINTERS, rows=129)
    first, second = launched.fake.launches
    assert (first.kernel, first.grid, first.stream) == ("widen_weight", (kind.outputs, -(-kind.depth // 2048), 1), 77)
    scale = {"scale": POINTERS.scale}
    given = {"wide": POINTERS.scratch, "weight": POINTERS.weight, "depth": kind.depth}
    assert launched.values(first) == given | (scale if kind.group else {})
    multiplied = launched.values(second)
    assert second.kernel == "product_tiles" and multiplied["weight"] == POINTERS.scratch and multiplied["rows"] == 129
    assert ("scale" in multiplied) == (not kind.group), "integers of one scale a row stay integers"
    assert product.scratch_bytes(129) == 2 * kind.outputs * kind.depth and product.scratch_bytes(128) == 0
    launched.enqueue(product, 128)  # as the weight lies
    few = launched.product(kind, 128)
    launched.enqueue(few, 128)


@pytest.mark.parametrize("rows", [1, 3, 9, 64, 65, 1000])
def test_programs_cover_every_row_and_column(launched: Launched, rows: int) -> None:
    launch = launched.enqueue(launched.product(replace(HALF, width=8240)), rows)
    (kernel,) = (k for k in launched.kernels.kernels if k.cubin == launch.cubin)
    c = kernel.constants
    row_tile, column_tile = (c.get(a) or c[b] for a, b in (("ROWS", "BLOCK_ROWS"), ("COLUMNS", "BLOCK_COLUMNS")))
    programs = np.prod(launch.grid)
    assert programs == -(-rows // int(row_tile)) * -(-8240 // int(column_tile))


def test_products_of_other_sizes_share_their_kernels() -> None:
    small, large = (product_sources(replace(INT8, width=width), 4096) for width in (1024, 4096))
    assert {str(s.labels) for s in small} == {str(s.labels) for s in large}


def test_a_kernel_for_each_class_of_rows_and_none_that_the_engine_never_needs() -> None:
    counts = [len(product_sources(HALF, rows)) for rows in (1, 2, *ROW_CLASSES[2:])]
    assert counts == sorted(counts) and counts[:2] == [1, 2] and counts[-1] >= 7
    assert len(product_sources(replace(INT8, x="int8"), 1)) == 2  # x is made int8 first
    for sources in (product_sources(kind, 4096) for kind in KINDS.values()):
        assert len({str(s.labels) for s in sources}) == len(sources)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_number_of_rows_has_a_cut_that_the_kernels_can_do(kind: ProductKind) -> None:
    for rows in (1, 2, 3, 4, 5, 16, 17, 100, 200, 400, 5000):
        cut = tile(kind, rows)
        assert isinstance(cut, Tile) or rows <= cut.rows
        group = multiplied(kind, rows).group
        assert not isinstance(cut, Tile) or not group or group % cut.depth == 0


def test_nothing_is_allocated_or_waited_for(launched: Launched) -> None:
    product = launched.product(WHOLE)
    before = len(launched.fake.calls)
    for rows in (1, 64, 1000):
        product.enqueue(77, POINTERS, rows=rows)
    assert {name for name, _ in launched.fake.calls[before:]} == {"cuLaunchKernel"}


@pytest.mark.parametrize("name", POINTERS.__dataclass_fields__)
def test_addresses_that_the_kernels_would_misread_are_refused(launched: Launched, name: str) -> None:
    product = launched.product(WHOLE)
    with pytest.raises(EngineError, match="multiples of 16 bytes"):
        product.enqueue(77, replace(POINTERS, **{name: getattr(POINTERS, name) + 8}), rows=1)
    assert not launched.fake.launches


def test_what_an_engine_lacks_is_said(launched: Launched) -> None:
    product = launched.product(HALF, 64)
    launched.enqueue(product, 64)
    with pytest.raises(EngineError, match="65 rows in an engine whose kernels are for 64: build it for larger steps"):
        product.enqueue(77, POINTERS, rows=65)
    with pytest.raises(EngineError, match="no kernel product_rows with BITS=8"):
        Product(launched.kernels, launched.device, INT8)


def test_a_width_that_is_no_multiple_of_16_has_kernels_that_assume_none() -> None:
    odd, even = (product_sources(replace(HALF, width=width), 1)[0] for width in (50257, 50256))
    assert "width" not in odd.aligned and "width" in even.aligned and odd.labels != even.labels


def compiled_shape(kernels: KernelSet) -> set[Any]:
    return {
        (
            k.name,
            k.architecture,
            str(sorted(launched_constants(k))),
            k.parameters,
            k.num_warps,
            k.aligned,
        )
        for k in kernels.kernels
    }


@pytest.mark.parametrize("architecture", [80, 90])
def test_compiled_kernels_have_the_parameters_that_are_launched(architecture: int) -> None:
    sources = product_sources(replace(INT8, bias=True), 8)[:3:2]  # one row, and up to 16
    compiled = compile_kernels(sources, [architecture])
    assert compiled_shape(compiled) == compiled_shape(uncompiled(sources, architecture))
    assert all(kernel.cubin.startswith(b"\x7fELF") for kernel in compiled.kernels)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED_LIMITS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_gpu_gets_kernels_that_fit_it(kind: ProductKind, architecture: int) -> None:
    sources = product_sources(kind, 1 << 20)
    compiled = compile_kernels(sources, [architecture])
    assert compiled_shape(compiled) == compiled_shape(uncompiled(sources, architecture))
    assert max(k.shared for k in compiled.kernels) <= SHARED_LIMITS[architecture] << 10


def enqueued(kernels: KernelSet, device: Device, given: Case, rows: int) -> float:
    """The error of a captured graph's replay, for the first `rows` rows."""
    stream, product = Stream(), Product(kernels, device, given.kind)
    out = np.full((rows, given.kind.width), np.nan, np.float32)
    import torch

    result = torch.tensor(out, device=DEVICE).to(getattr(torch, given.kind.out_dtype))
    pointers = ProductPointers(
        x=given.x.data_ptr(),
        x_stride=given.x.stride(0),
        weight=given.weight.data_ptr(),
        out=result.data_ptr(),
        **{n: t.data_ptr() for n in ("scale", "bias", "add", "x_scale") if (t := getattr(given, n)) is not None},
        scratch=(scratch := torch.empty(product.scratch_bytes(rows) + 1, dtype=torch.int8, device=DEVICE)).data_ptr(),
    )
    torch.cuda.synchronize()
    product.enqueue(stream, pointers, rows=rows)
    with stream.capture() as graph:
        product.enqueue(stream, pointers, rows=rows)
    result.fill_(torch.nan)
    torch.cuda.synchronize()
    graph.launch(stream)
    stream.synchronize()
    del scratch
    found = result.double().cpu().numpy()
    expected = given.expected[:rows]
    if not np.isfinite(found).all():
        return float("inf")
    return float((np.abs(found - expected).max(1) / np.abs(expected).max(1)).max())


@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("width", [1024, 1000])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_captured_graph_multiplies(kind: ProductKind, width: int) -> None:
    kind = replace(kind, depth=1408, width=width)
    device = Device.open()
    major, minor = device.compute_capability
    kernels = compile_kernels(product_sources(kind, 300), [10 * major + minor])
    given = case(kind, 300)
    for rows in (1, 2, 3, 5, 16, 17, 63, 64, 65, 130, 300):
        assert enqueued(kernels, device, given, rows) < tolerance(kind, rows), rows
    assert enqueued(kernels, device, replace(given, expected=-given.expected), 5) > 1  # what is wrong is seen
