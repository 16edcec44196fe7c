"""The bench panel: latencies of an engine as histograms, and its steps on the machine's roofline.

`state.py` has what is known, `draw.py` and `draw_roofline.py` draw it, `panel.py` measures in a thread. The data is that of `llmlab/evaluate/latencies.py` and
`roofline.py`.
"""
