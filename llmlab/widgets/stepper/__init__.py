"""The pass stepper: `llmlab.steps(graph)`, what each pass did to a graph, from its history alone.

`source.py` reads a pass's lines from the installed package, `panel.py` is the panel.
"""
