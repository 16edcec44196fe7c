"""What the engine view shows of layers that were measured, and what was chosen there."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property

from llmlab.errors import InputError
from llmlab.evaluate.layers.align import Alignment, PairRow, align
from llmlab.evaluate.layers.model import CompiledLayer, EngineLayers, Row
from llmlab.runtime.engine import Engine
from llmlab.script import script

SORTS = {"time": "longest first", "order": "as it runs", "name": "by name", "difference": "largest difference first"}
"""Ways to sort, and how they are called; `difference` is for two engines."""


class EngineViewState:
    """`measured` has one EngineLayers for each engine; `engines` are those that can be measured again, or none."""

    def __init__(self, engines: list[Engine], measured: list[EngineLayers]) -> None:
        self.engines, self.measured = engines, measured
        phases = measured[0].phases
        self.phase = phases[0] if phases else "decode"
        self.sort = "time" if phases else "order"
        self.search = ""
        self.block = ""
        self.status = ""

    def title(self) -> str:
        names = " against ".join(f"{m.engine} ({m.target})" for m in self.measured)
        return f"What runs in {names}"

    @cached_property
    def scripts(self) -> list[tuple[str, str]]:
        """(name, Python that rebuilds it) of each engine whose manifest tells how it was made."""
        found = []
        for engine in self.engines:
            if isinstance(engine, Engine):  # a layer listing may be of something that has no manifest
                with suppress(InputError):
                    found.append((engine.path.name, script(engine)))
        return found

    @property
    def alignment(self) -> Alignment | None:
        """Of two engines in the phase that is shown."""
        if len(self.measured) != 2:
            return None
        first, second = self.measured
        return align(first, second, self.phase)

    def rows(self) -> list[Row] | list[PairRow]:
        """What is shown, in order."""
        if (both := self.alignment) is not None:
            pairs = both.rows(lambda pair: any(map(self._shown, (*pair.first, *pair.second))))
            if self.sort == "name":
                return sorted(pairs, key=lambda row: row.name)
            if self.sort != "order":
                return sorted(pairs, key=self._weight, reverse=True)
            return pairs
        single = self.measured[0].rows(lambda layer: self.phase in layer.phases and self._shown(layer))
        if self.sort == "name":
            return sorted(single, key=lambda row: row.name)
        if self.sort != "order":
            return sorted(single, key=lambda row: row.seconds(self.phase) or 0.0, reverse=True)
        return single

    def _weight(self, row: PairRow) -> float:
        one, two = (row.seconds(side, self.phase) or 0.0 for side in (0, 1))
        return abs(one - two) if self.sort == "difference" else max(one, two)

    def _shown(self, layer: CompiledLayer) -> bool:
        if self.block and layer.layer != self.block:
            return False
        words = self.search.lower().split()
        text = " ".join((layer.name, layer.kind, layer.dtype, *layer.kernels, *layer.nodes)).lower()
        return all(word in text for word in words)

    def blocks(self) -> list[str]:
        """Transformer layers, and modules outside of them, in running order."""
        return list(dict.fromkeys(layer.layer for m in self.measured for layer in m.layers))
