"""A small model of each variant. All but MAC's have a memory in both layers."""

from __future__ import annotations

from titans_export.model import MemoryConfig, ModelConfig

ATTENTION = {"attention_heads": 2, "window": 24, "persistent": 2}
CONFIGS = {
    "mac": ModelConfig("mac", 61, 16, 2, 24, MemoryConfig(2, 8, 8), memory_layers=(0,), **ATTENTION),
    "mag": ModelConfig("mag", 61, 16, 2, 24, MemoryConfig(2, 8, 8, depth=2, activation="gelu"), **ATTENTION),
    "mal": ModelConfig("mal", 61, 16, 2, 24, MemoryConfig(2, 8, 8, depth=2, residual=True), **ATTENTION),
    "lmm": ModelConfig(
        "lmm", 61, 16, 2, 24, MemoryConfig(2, 8, 8, depth=3, residual=True, layer_norm=True, step_limit=0.1)
    ),
}
