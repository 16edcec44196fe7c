"""One file a rewrite. A pass finds its pattern, checks it (and says why not), and rewrites; none knows an architecture.

May import `rewrite`, `edit`, analysis, operators and store; no lowering imports a pass.
"""
