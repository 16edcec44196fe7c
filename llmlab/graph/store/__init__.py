"""Graphs on disk: checked before anything is read, weights streamed one tensor at a time, opened as memory maps."""
