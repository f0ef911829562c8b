"""Checkpoint formats: one module each, named as the format, with `load(path) -> Checkpoint`."""
