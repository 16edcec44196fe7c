"""The fused attention/KV-cache plugin: its NumPy reference, which every other implementation is held against.

Imports nothing else of llmlab.
"""
