"""The command line: a function a verb in `app.py`, and what the verbs show and ask. No logic of its own.

May import everything; nothing imports it.
"""

from llmlab.cli.app import app, main

__all__ = ["app", "main"]
