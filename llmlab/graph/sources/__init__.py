"""Where graphs come from: torch modules, checkpoints, ONNX files, NeMo archives. Each ends as a plain graph."""
