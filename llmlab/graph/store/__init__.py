"""Graphs on disk: checked before anything is read, weights streamed one tensor at a time, opened as memory maps.

Knows onnx and the surgeon's graph only: no other room, and not `Graph`, which saves and loads itself with it.
"""
