"""The bench panel: latencies of an engine as histograms, and its steps on the machine's roofline.

`panel.py` measures in a thread and keeps what is known, `draw.py` draws it. The data is that of `llmlab/evaluate/latencies.py` and
`roofline.py`.
"""
