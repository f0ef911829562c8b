"""Engines: the graphs of a bundle compiled for one device. See docs/engines.md."""
