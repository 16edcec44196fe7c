"""Operators that users declare, and their ONNX bodies, which travel with a graph as functions."""
