"""Other weights for an engine that was built with `BuildConfig(refit=True)`: seconds, where a build takes minutes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmlab.errors import EngineError, nearest
from llmlab.tensorrt.library import Library


def refit(library: Library, engine: Any, weights: Mapping[str, NDArray[Any]]) -> None:
    """Replace the weights of an engine that is open, by the names that they have in its ONNX file; the others stay.

    Each array has the shape and the type of the one that it replaces. Raises EngineError in one line, and then the
    engine must not be run: some of its weights may be new, others old.
    """
    if not engine.refittable:
        raise EngineError("the engine's weights are fixed: build it with BuildConfig(refit=True)")
    library.heard.clear()
    refitter = library.module.Refitter(engine, library.logger)
    known = set(refitter.get_all_weights())
    held = []  # TensorRT reads the arrays when it refits
    for name, array in weights.items():
        if name not in known:
            raise EngineError(f"the engine has no weight {name!r}; {nearest(name, known)}")
        held.append(np.ascontiguousarray(array))
        if not refitter.set_named_weights(name, library.module.Weights(held[-1])):
            raise EngineError(f"weight {name} of {array.dtype} {array.shape} doesn't fit ({library.heard.text})")
    if missing := refitter.get_missing_weights():
        raise EngineError(
            f"weights that were merged are replaced together: {', '.join(sorted(missing)[:4])} must be given too"
        )
    if not refitter.refit_cuda_engine():
        raise EngineError(f"{library} can't refit the engine ({library.heard.text or 'no reason given'})")
