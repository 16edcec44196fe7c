"""The engine view: what a compiler made of a graph, or two engines of one model beside each other.

`state.py` has what is shown and what was chosen, `draw.py` draws it, `panel.py` is the panel and measures again. The data is that
of `llmlab/evaluate/layers/`.
"""
