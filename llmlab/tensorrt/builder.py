"""ONNX files → plans. polygraphy's loaders parse, configure and build; what they leave open is here."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from llmlab.errors import EngineError, InputError, LlmlabError, UnsupportedModelError
from llmlab.tensorrt.config import BuildConfig, Profile
from llmlab.tensorrt.gpu import visible_gpu
from llmlab.tensorrt.library import Library
from llmlab.tensorrt.plugin import plugin_host
from llmlab.tensorrt.precision import WeakTyping, apply_weak_typing
from llmlab.tensorrt.progress import BuildProgress, make_monitor, run_beside
from llmlab.tensorrt.timing import TimingCache

_BUILDING = threading.Lock()  # TensorRT has one logger a process; two builds would mix up what it says


@dataclass(frozen=True)
class Plan:
    """A compiled part."""

    data: memoryview
    listing: str
    """The layers as the builder listed them, for `llmlab.tensorrt.layers.parse_listing`; empty where it lists none."""
    seconds: float
    """How long it took to build."""


class PlanBuilder:
    """Builds the parts of one engine, one after the other, with one timing cache and one progress bar.

        with PlanBuilder(library, config, total=len(parts)) as builder:
            plan = builder.build("part.onnx", config.profiles({"x": ("T", 4096)}), name="layers.0", key="layer")

    Ctrl-C stops within a part where TensorRT can be stopped there, else after it, and leaves no file behind but
    `config.timing_cache`, which keeps what was measured so far.
    """

    def __init__(self, library: Library, config: BuildConfig, total: int = 1) -> None:
        """`total`: how many parts there will be. Raises InputError for what this TensorRT can't do."""
        self.library = library
        self.config = config
        self._check()
        self._capabilities = library.check_capabilities(config.compute_capabilities)
        self._cache = TimingCache(library, config.timing_cache)
        self._progress = BuildProgress(total)
        self._built: dict[str, float] = {}

    def _check(self) -> None:
        if self.config.precision not in self.library.precisions:
            raise InputError(
                f"precision is {self.config.precision!r}, {self.library} has {', '.join(self.library.precisions)}"
            )
        if self.library.needs_gpu:
            self.library.require_gpu()
        elif self.config.refit and visible_gpu() is None:
            raise InputError("refit=True compiles on the GPU, and there is none: leave it out, or build where one is")
        self.library.hosting(self.config.attention)

    def __enter__(self) -> PlanBuilder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.close()
        with suppress(InputError) if error else nullcontext():  # what went wrong first is what is said
            self._cache.save()

    def build(
        self,
        onnx_path: str | Path,
        profiles: Iterable[Profile],
        *,
        name: str,
        key: str | None = None,
        weak: WeakTyping | None = None,
        plugin: bool = False,
    ) -> Plan:
        """Compile one ONNX file; its weights may lie beside it, and be of any size.

        profiles: shapes of the inputs, a mapping for each optimization profile. name: the part, for messages.
        key: parts with one key have the same layers, so that one says how long the next will take. weak: what a float32
        file leaves open, where the TensorRT chooses precisions itself. plugin: whether it holds PagedAttention nodes.
        Raises UnsupportedModelError where the parser refuses a node, EngineError where the build fails.
        """
        path = Path(onnx_path)
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        key = key or name
        last = self._built.get(key, self._cache.seconds.get(key))
        stop = threading.Event()
        start = time.monotonic()
        with ExitStack() as held:
            held.enter_context(_BUILDING)
            self.library.heard.clear()
            if plugin:
                held.enter_context(plugin_host(self.library.module).reporting())
            data = run_beside(
                lambda: self._compile(path, list(profiles), name, weak or WeakTyping(), plugin, stop),
                lambda seconds: self._progress.watch(name, last, seconds),
                lambda: self._stop(name, stop),
            )
            listing = self.library.heard.listing
        seconds = time.monotonic() - start
        if key not in self._built:  # the next of a kind finds its kernels measured: a later build won't
            self._cache.seconds[key] = seconds
        self._built[key] = seconds
        self._progress.done()
        return Plan(data, listing, seconds)

    def _stop(self, name: str, stop: threading.Event) -> None:
        stop.set()
        if not self.library.progress_monitor:
            print(f"{self.library} can't be stopped within a part: waiting for {name}", file=sys.stderr)

    def _compile(
        self, path: Path, profiles: list[Profile], name: str, weak: WeakTyping, plugin: bool, stop: threading.Event
    ) -> memoryview:
        """In a thread of its own. Any failure is one line, with what TensorRT said."""
        loaders = self.library.polygraphy()
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER

        trt = self.library.module
        step = "can't be parsed"

        def declare(network: Any) -> None:
            nonlocal step
            _check_profiles(network, profiles, name)
            if not self.library.strongly_typed:
                apply_weak_typing(trt, network, weak)
            step = "can't be built"

        def configure(builder: Any, network: Any, config: Any) -> None:
            self._cache.attach(config)
            if plugin:
                config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
            if not self.library.strongly_typed and _quantized(trt, network):
                config.set_flag(trt.BuilderFlag.INT8)

        try:
            with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
                parsed = loaders.NetworkFromOnnxPath(str(path), strongly_typed=self.library.strongly_typed or None)
                network = loaders.PostprocessNetwork(parsed, declare)
                config = loaders.PostprocessConfig(self._loader(loaders, profiles, stop), configure)
                return memoryview(loaders.EngineBytesFromNetwork(network, config)())
        except LlmlabError:
            raise
        except (PolygraphyException, TypeError, RuntimeError, MemoryError) as problem:
            if stop.is_set():
                raise KeyboardInterrupt from problem
            raise self._failure(name, step, problem) from problem

    def _loader(self, loaders: Any, profiles: list[Profile], stop: threading.Event) -> Any:
        """polygraphy's configuration."""
        trt, config = self.library.module, self.config
        shapes = []
        for given in profiles:
            profile = loaders.Profile()
            for tensor, (low, usual, high) in given.items():
                profile.add(tensor, low, usual, high)
            shapes.append(profile)
        options: dict[str, Any] = {
            "profiles": shapes or None,
            "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
            "builder_optimization_level": config.optimization_level,
            "refittable": config.refit,
        }
        if config.workspace_bytes is not None:
            options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: config.workspace_bytes}
        if self.library.progress_monitor:
            options["progress_monitor"] = make_monitor(trt, self._progress, stop)
        if self.library.rtx:
            from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

            return CreateConfigRTX(compute_capabilities=list(self._capabilities), **options)
        options["hardware_compatibility_level"] = self.library.hardware_compatibility(self._capabilities)
        if self.library.foreign_tactics:
            options["tactic_sources"] = []
        if not self.library.strongly_typed:
            options["fp16"] = config.precision == "float16"
            options["precision_constraints"] = "obey"
        return loaders.CreateConfig(**options)

    def _failure(self, name: str, step: str, problem: BaseException) -> LlmlabError:
        said = self.library.heard.text or " ".join(str(problem).split()) or type(problem).__name__
        if self.library.heard.out_of_memory or isinstance(problem, MemoryError):
            return EngineError(
                f"{name} {step}: out of memory: stop what else runs on this GPU, or lower workspace_bytes or max_tokens_per_step ({said})"
            )
        kind = UnsupportedModelError if step == "can't be parsed" else EngineError
        return kind(f"{name} {step} by {self.library}: {said}")


def build_plan(
    library: Library,
    onnx_path: str | Path,
    profiles: Iterable[Profile],
    config: BuildConfig,
    *,
    name: str | None = None,
    weak: WeakTyping | None = None,
    plugin: bool = False,
) -> Plan:
    """Compile one ONNX file that is a whole engine: `PlanBuilder.build` of a single part."""
    with PlanBuilder(library, config) as builder:
        return builder.build(onnx_path, profiles, name=name or Path(onnx_path).name, weak=weak, plugin=plugin)


def _check_profiles(network: Any, profiles: list[Profile], name: str) -> None:
    """Raises InputError for an input whose shape is open: polygraphy would build for a size of one."""
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        if -1 in tuple(tensor.shape) and not (profiles and all(tensor.name in profile for profile in profiles)):
            raise InputError(
                f"{name}: input {tensor.name} has the shape {tuple(tensor.shape)}, expected its sizes in each profile"
            )


def _quantized(trt: Any, network: Any) -> bool:
    kinds = (trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE)
    return any(network.get_layer(i).type in kinds for i in range(network.num_layers))
