"""Graph folders: written whole or not at all, opened with suspicion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from llmlab.graph.storage import DeferredValues, write_onnx


class _Sevens(DeferredValues):
    def load(self) -> np.ndarray:
        return np.full(self.shape, 7, self.dtype)


def test_deferred_constants_of_any_size_are_written(tmp_path: Path) -> None:
    x, out = gs.Variable("x", np.dtype(np.float32), [None]), gs.Variable("out", np.dtype(np.float32), [None])
    constants = [gs.Constant(f"c{n}", _Sevens((n,), np.dtype(np.float32))) for n in (3, 1000)]
    node = gs.Node("Concat", inputs=[x, *constants], outputs=[out], attrs={"axis": 0})
    write_onnx(gs.Graph([node], [x], [out], opset=23), tmp_path)
    model = onnx.load(tmp_path / "graph.onnx")
    found = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert {n: (len(a), set(a.tolist())) for n, a in found.items()} == {"c3": (3, {7.0}), "c1000": (1000, {7.0})}
    assert all(isinstance(c._values, _Sevens) for c in constants), "the graph in memory is as before"
