"""Quantization: recipes, the rounding of weights and activations, and where both go in the serving graph.

May import `graph` (but not the other way round) and what everything may; onnxruntime is imported where a calibration runs;
never `runtime`.
"""
