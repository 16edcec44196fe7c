"""Instrument panels for notebooks: view-models in Python that draw themselves as HTML and SVG.

`panel.py` is what all panels are, `markup.py` what they are drawn with, `live.py` the one bridge to a notebook's page,
with `morph.js`, `panel.js` and `panel.css` beside it. Each other file or folder is one panel. May import everything else of llmlab
and is imported by none of it, but the command line. Without anywidget, and in exported notebooks, a panel is a picture.
"""
