"""NeMo archives as checkpoints: files inside the tar (archive), model_config.yaml (config), names and layouts (weights)."""
