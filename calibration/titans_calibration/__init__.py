"""Quantised bundles: recipes, ranges observed over data, and rewritten graphs and memories."""

import titans_export  # noqa: F401  (before any import of onnxruntime: it switches telemetry off)
