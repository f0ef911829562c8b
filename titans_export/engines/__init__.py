"""Engines: a bundle's graphs, compiled for one device each. docs/engines.md."""
