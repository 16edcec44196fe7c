"""One file a target: the serving graph's PagedAttention nodes become what the target has."""
