"""The chat panel: one engine or two answer, token by token, with what they were sure of.

`model.py` is a conversation as plain data, `speaker.py` one engine and its worker thread, `conversation.py` who says what
when, `panel.py` the panel and `llmlab.chat`, `draw.py` how it looks. May import the runtime and the other files of `llmlab/widgets`.
"""
