"""Every error that a user can cause. Each message is one line: what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class LlmlabError(Exception):
    """Base of all errors that llmlab raises on purpose. The command line prints the message and exits with 2."""


class InputError(LlmlabError, ValueError):
    """An argument has a value that can't be used."""


class CheckpointError(LlmlabError):
    """A checkpoint folder is incomplete, truncated or inconsistent."""


class GraphError(LlmlabError):
    """A graph folder is damaged, altered, or of another version; or a graph is not what a step expects."""


class UnsupportedModelError(LlmlabError):
    """A graph holds something that no pass or target handles; the message names it."""


class PassError(LlmlabError):
    """A pass raised something, or gave back something else than it should; the message names the pass and the node."""


class EngineError(LlmlabError):
    """An engine folder is damaged, altered, or of a version that this llmlab can't run."""


class GpuLostError(EngineError):
    """The GPU failed while it ran; nothing more runs on it in this process."""


class MissingDependencyError(LlmlabError, ImportError):
    """An optional library is not installed; the message names the extra that brings it."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise one line that names the llmlab extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{module} is needed here and can't be imported ({error}): pip install 'llmlab[{extra}]'"
        ) from error


def nearest(name: str, known: Iterable[str]) -> str:
    """What may have been meant by `name`, for the end of an error message."""
    names = sorted(set(known))
    if close := difflib.get_close_matches(name, names, n=3, cutoff=0.4):
        return f"nearest: {', '.join(close)}"
    return f"known: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}" if names else "there are none"
