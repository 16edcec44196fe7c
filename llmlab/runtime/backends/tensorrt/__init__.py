"""Steps on a GPU: the parts that TensorRT compiled and our attention kernels, in a program's order, over real KV pages.

open      an engine folder, checked against what is here → the backend
backend   `Backend` and `Pipelined`: steps in, logits or tokens out
executor  one step of a shape: eagerly, or captured once in a CUDA graph and replayed
parts     TensorRT's engines: a context for each optimization profile, one block of scratch memory for all
attention what the attention kernels of each layer read and write
memory    where tensors and the KV pool lie: placed by liveness, sized from what is free
staging   a step's few integers: one page-locked buffer, one copy
buckets   the shapes that steps are padded to

At run time this needs numpy, cuda-bindings and TensorRT, and no torch, triton, onnx or onnxruntime.
"""
