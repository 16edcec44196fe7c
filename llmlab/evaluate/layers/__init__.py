"""What a compiler made of a graph: layers of an engine with the serving graph's nodes that each computes, their precision and time.

`model.py` is what all have, `measure.py` the public function, `onnxruntime.py` (with `profile.py`) and `tensorrt.py` (with
`tensorrt_steps.py`) read one target each, `align.py` holds two engines of one model against each other.
"""
