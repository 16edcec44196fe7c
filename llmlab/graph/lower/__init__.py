"""One file a target: the serving graph's PagedAttention nodes become what the target has.

May import `edit`, analysis, operators and store; no pass: what both need lies beside `edit`.
"""
