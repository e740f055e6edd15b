"""The training loop. Empty on purpose: configs read `run_config` without importing torch."""
