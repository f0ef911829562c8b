"""Quantised bundles: recipes, what a model does over data, and graphs and memories in fewer bits."""
