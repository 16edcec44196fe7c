"""The batching monitor: requests, steps and KV blocks of an engine core, step by step.

`sources.py` is what can be monitored, `paged.py` the paged reference backend for graphs, `traffic.py` a core with the
requests that were sent to it, `run.py` that core or a recorded run, one step after the other, `player.py` the thread that
steps, `panel.py` the panel and `llmlab.monitor`, `timeline.py` and `draw.py` how it looks. What happened is recorded by
`llmlab/runtime/trace.py`. May import the runtime, the graph's interpreter and `llmlab/widgets`.
"""
