"""Configuration: YAML files, layers, types, checks."""
