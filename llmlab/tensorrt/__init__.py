"""TensorRT: which one is there (`library`), plans built from ONNX files (`builder`), and what is in a plan (`inspect`).

Only `library.py` knows versions. Nothing here imports a graph; TensorRT itself is imported when it is first used.
"""
