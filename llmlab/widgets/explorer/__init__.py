"""The precision explorer: a precision for each product by hand or by a budget, with what it is expected to cost.

`mix.py` is the choice and its arithmetic, `draw.py` its pictures, `explorer.py` the panel.
"""
