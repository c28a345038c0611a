"""Flax layers shared by several networks. Names and formulas follow DiT (arXiv 2212.09748)."""

from diffussm_jax.layers.embeddings import NUM_TIME_FEATURES, TimeEmbed, sincos_2d, sinusoidal_features
from diffussm_jax.layers.linear import Linear, gelu
from diffussm_jax.layers.norms import AdaLayerNorm

__all__ = ["NUM_TIME_FEATURES", "AdaLayerNorm", "Linear", "TimeEmbed", "gelu", "sincos_2d", "sinusoidal_features"]
