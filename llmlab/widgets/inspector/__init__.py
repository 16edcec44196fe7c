"""The graph inspector: `llmlab.inspect(graph)`.

Plain data: `hierarchy.py` (layer → block → node, alike ones as one), `flops.py`, `overlays.py` (numbers on nodes, summed up),
`search.py`, `values.py` (samples of weights), `edges.py` (tensors between rows), `state.py` (all that is shown, and what was chosen).
Drawing: `draw_tree.py`, `draw_bar.py`, `draw_block.py`, `draw_details.py`. `panel.py` is the panel.
"""
