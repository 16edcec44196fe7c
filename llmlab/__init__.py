"""llmlab: from a language-model checkpoint to a fast engine, one visible step at a time.

    import llmlab as ll
    graph = ll.optimize(ll.export("path/or/hub-id"))
    llm = ll.LLM(ll.build(graph, "engines/mine"))
    llm.generate("How do I count to nine in French?")

The names below are imported when they are first used (PEP 562), so that `import llmlab` costs nothing and needs no
optional library.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from llmlab.build import build as build
    from llmlab.errors import LlmlabError as LlmlabError
    from llmlab.evaluate.accuracy import evaluate as evaluate
    from llmlab.evaluate.compare import compare as compare
    from llmlab.evaluate.layers.measure import layers as layers
    from llmlab.evaluate.search import search as search
    from llmlab.evaluate.sensitivity import sensitivity as sensitivity
    from llmlab.graph.convert import convert as convert
    from llmlab.graph.cut import cut as cut
    from llmlab.graph.edit import Editor as Editor
    from llmlab.graph.export import export as export
    from llmlab.graph.graph import Graph as Graph
    from llmlab.graph.operators.operator import operator as operator
    from llmlab.graph.optimize import optimize as optimize
    from llmlab.graph.optimize import register_pass as register_pass
    from llmlab.graph.optimize import registered_pass as registered_pass
    from llmlab.graph.optimize import unregister_pass as unregister_pass
    from llmlab.graph.reports.diff import GraphDiff as GraphDiff
    from llmlab.graph.reports.diff import diff as diff
    from llmlab.graph.rewrite import Match as Match
    from llmlab.graph.rewrite import Pass as Pass
    from llmlab.quant.quantize import quantize as quantize
    from llmlab.quant.recipe import Recipe as Recipe
    from llmlab.runtime.async_llm import AsyncLLM as AsyncLLM
    from llmlab.runtime.engine import Engine as Engine
    from llmlab.runtime.llm import LLM as LLM
    from llmlab.runtime.params import SamplingParams as SamplingParams
    from llmlab.script import script as script
    from llmlab.tensorrt.config import BuildConfig as BuildConfig
    from llmlab.widgets.bench_panel.panel import bench as bench
    from llmlab.widgets.build_panel.panel import watch_build as watch_build
    from llmlab.widgets.chat.panel import chat as chat
    from llmlab.widgets.explorer.explorer import explore as explore
    from llmlab.widgets.inspect import inspect as inspect
    from llmlab.widgets.monitor.panel import monitor as monitor
    from llmlab.widgets.stepper.panel import steps as steps

_HOME = {
    "export": "llmlab.graph.export",
    "optimize": "llmlab.graph.optimize",
    "cut": "llmlab.graph.cut",
    "convert": "llmlab.graph.convert",
    "quantize": "llmlab.quant.quantize",
    "Recipe": "llmlab.quant.recipe",
    "build": "llmlab.build",
    "BuildConfig": "llmlab.tensorrt.config",
    "Graph": "llmlab.graph.graph",
    "Engine": "llmlab.runtime.engine",
    "evaluate": "llmlab.evaluate",
    "compare": "llmlab.evaluate.compare",
    "script": "llmlab.script",
    "explore": "llmlab.widgets.explorer.explorer",
    "sensitivity": "llmlab.evaluate.sensitivity",
    "search": "llmlab.evaluate.search",
    "layers": "llmlab.evaluate.layers.measure",
    "watch_build": "llmlab.widgets.build_panel.panel",
    "bench": "llmlab.widgets.bench_panel.panel",
    "LLM": "llmlab.runtime.llm",
    "AsyncLLM": "llmlab.runtime.async_llm",
    "SamplingParams": "llmlab.runtime.params",
    "inspect": "llmlab.widgets.inspect",
    "steps": "llmlab.widgets.stepper.panel",
    "diff": "llmlab.graph.reports.diff",
    "GraphDiff": "llmlab.graph.reports.diff",
    "register_pass": "llmlab.graph.optimize",
    "unregister_pass": "llmlab.graph.optimize",
    "registered_pass": "llmlab.graph.optimize",
    "Pass": "llmlab.graph.rewrite",
    "Match": "llmlab.graph.rewrite",
    "Editor": "llmlab.graph.edit",
    "operator": "llmlab.graph.operators.operator",
    "chat": "llmlab.widgets.chat.panel",
    "monitor": "llmlab.widgets.monitor.panel",
    "LlmlabError": "llmlab.errors",
}

__all__ = [  # noqa: RUF022 (in the order of the road)
    "export",
    "optimize",
    "convert",
    "quantize",
    "Recipe",
    "cut",
    "build",
    "BuildConfig",
    "Graph",
    "Engine",
    "LLM",
    "AsyncLLM",
    "SamplingParams",
    "evaluate",
    "compare",
    "sensitivity",
    "search",
    "script",
    "explore",
    "layers",
    "watch_build",
    "bench",
    "inspect",
    "steps",
    "diff",
    "GraphDiff",
    "register_pass",
    "unregister_pass",
    "registered_pass",
    "Pass",
    "Match",
    "Editor",
    "operator",
    "chat",
    "monitor",
    "LlmlabError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'llmlab' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llmlab")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "0+unknown"


class _Package(ModuleType):
    """Importing llmlab/build.py binds the module to `llmlab.build`; this keeps the function of that name there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOME.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
