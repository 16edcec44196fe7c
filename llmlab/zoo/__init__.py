"""The models that ship with llmlab, and how they were made.

`tasks` generates chats with known answers (core install alone), `train` makes the checkpoint (needs the extra
`export`), `score` grades any way of running it. May import the runtime, but only inside functions.
"""

from __future__ import annotations

from pathlib import Path

from llmlab.errors import InputError

_HERE = Path(__file__).parent
_NAMES = ("tinychat",)


def names() -> tuple[str, ...]:
    """The checkpoints that ship."""
    return _NAMES


def path(name: str = "tinychat") -> Path:
    """The folder of a shipped checkpoint, in Hugging Face's layout.

    Raises:
        InputError: no checkpoint of that name ships, or this installation lacks its files.
    """
    if name not in _NAMES:
        raise InputError(f"no model {name!r} ships with llmlab, expected one of: {', '.join(_NAMES)}")
    folder = _HERE / name
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"the files of {name!r} are missing from {folder}: reinstall llmlab")
    return folder
