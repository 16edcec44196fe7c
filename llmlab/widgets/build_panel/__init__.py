"""Build progress: stages with the time that each took, bytes on disk, what happened, and a button that stops.

`run.py` builds in a thread and keeps what is known, `panel.py` shows it.
"""
