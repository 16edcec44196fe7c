"""In place of a calibration: one scale for all static activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from llmlab.graph.graph import Graph
from llmlab.quant import methods
from llmlab.quant.calibrated import Calibrated
from llmlab.quant.solve import Assigned, Found
from llmlab.quant.walk import Group

ANYTHING = [[5] * 300]
"""Calibration data that nobody looks at."""


@contextmanager
def static_scale(scale: float) -> Iterator[None]:
    """Within it, `quantize` finds this scale for whatever has static activations, and runs nothing."""

    def calibrate(graph: Graph, assigned: Assigned, data: list[np.ndarray], **options: Any) -> Calibrated:
        static = {name: np.ndarray for name, (_, asked) in assigned.items() if asked is not None and not asked.dynamic}
        return Calibrated([(Group("", "", {"": static}), Found(scale=scale))])

    with mock.patch.object(methods, "calibrate", calibrate):
        yield
