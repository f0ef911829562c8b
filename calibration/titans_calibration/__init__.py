"""Quantised bundles: recipes, ranges observed over data, and rewritten graphs and memories."""
