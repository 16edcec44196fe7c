"""The engine view: what a compiler made of a graph, or two engines of one model beside each other.

`panel.py` holds what is shown and what was chosen, `draw.py` draws it. The data is that of `llmlab/evaluate/layers/`.
"""
