"""Sampled tokens become inputs: the kernel under Triton's interpreter (or on a GPU), and what is launched."""

from __future__ import annotations

import importlib.util
import os
import struct

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'llmlab[tensorrt]'", allow_module_level=True)
import torch
from fake_driver import FakeDriver, installed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

from llmlab.cuda import Device  # noqa: E402 (the interpreter is chosen when triton is imported)
from llmlab.kernels.binaries import Kernel, KernelSet  # noqa: E402
from llmlab.kernels.compile import feed_source  # noqa: E402
from llmlab.kernels.feed import TokenFeed  # noqa: E402
from llmlab.kernels.gpu import geometry  # noqa: E402
from llmlab.kernels.gpu.feed import feed_tokens  # noqa: E402


@pytest.mark.parametrize("count", [1, 5, 256, 300])
def test_references_become_tokens(count: int) -> None:
    previous = torch.arange(100, 100 + count, dtype=torch.int32)
    previous[0] = -1  # no token came of that row
    ids = torch.arange(count + 3, dtype=torch.int32)
    ids[:count:2] = -1 - torch.arange(count, dtype=torch.int32)[::2].flip(0)
    want = torch.where(ids < 0, previous[(-1 - ids).clamp(min=0, max=count - 1)].clamp(min=0), ids)
    ids[count:] = want[count:] = -7  # past the end: not to be touched, not to be followed
    ids, launch = ids.to(DEVICE), geometry.feed(count)
    feed_tokens[launch.grid](ids, previous.to(DEVICE), count, **launch.constants, **launch.options)
    assert ids.tolist() == want.tolist()


def test_what_is_launched() -> None:
    source = feed_source()
    types = {"ids": "ptr", "previous": "ptr", "count": "i32"}
    kernel = Kernel("feed_tokens", source.constants, 90, tuple(types.items()), 2, 0, False, b"feed")
    with installed(FakeDriver()) as fake:
        fake.parameters = {kernel.cubin: 5}
        TokenFeed(KernelSet([kernel]), Device.open()).enqueue(7, ids=0x1000, previous=0x2000, count=300)
        [launch] = fake.launches
    assert launch.grid == (2, 1, 1) and launch.threads == 64 and launch.stream == 7
    assert [struct.unpack("<Q", word)[0] for word in launch.words[:2]] == [0x1000, 0x2000]
    assert struct.unpack("<i4x", launch.words[2])[0] == 300
