"""The chat panel: one engine or two answer, token by token, with what they were sure of.

`model.py` is the conversation as plain data, `speaker.py` one engine and its worker thread, `panel.py` the panel and
`llmlab.chat`, `draw.py` how it looks. May import the runtime and the other files of `llmlab/widgets`.
"""
