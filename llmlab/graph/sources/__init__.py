"""Where graphs come from: torch modules, checkpoints, ONNX files, NeMo archives. Each ends as a plain graph.

May import `Graph`, analysis, operators and store; no pass: a source says what is there and rewrites nothing.
"""
