"""Attention kernels for NVIDIA GPUs in Triton, and how they are cut into programs. Imports nothing of llmlab but errors."""
