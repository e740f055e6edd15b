"""Models. Empty on purpose: configs read `model_config` without importing torch; see `zoo` for loading
models."""
