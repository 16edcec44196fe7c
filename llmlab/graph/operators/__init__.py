"""Operators that users declare, and their ONNX bodies, which travel with a graph as functions.

`declaration` says what an operator is; its check and its torch side build on that, `operator` on all of them.
May import `Graph`, `edit` and store; no pass, no source.
"""
