"""What llmlab's own nodes compute: defined in NumPy, which every other implementation is held against, and as kernels for NVIDIA GPUs.

`gpu/` holds the Triton sources, `compile.py` turns them into binaries where no GPU need be, and `attention.py`, `sampling.py` and
`feed.py` launch those without torch and triton. Imports nothing of llmlab but `cuda`, `files` and `errors`.
"""
