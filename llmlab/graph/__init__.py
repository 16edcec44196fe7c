"""ONNX in, ONNX out: export, the passes that make a serving graph of it, and the lowering to each target.

May import config, checkpoint, files, errors and `kernels.reference`; never `runtime`.
"""
