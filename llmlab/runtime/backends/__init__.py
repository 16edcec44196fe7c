"""What executes a step: one file a runtime. Each implements `runtime.batch.Backend` and knows nothing of requests."""
