"""What a part of a graph is, found out by running it or by walking it; nothing here changes a graph.

May import `Graph`, `edit` and operators; passes, sources and lowerings import it, never the other way round.
"""
