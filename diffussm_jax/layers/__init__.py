"""Flax layers shared by several networks. Names and formulas follow DiT (arXiv 2212.09748)."""

from diffussm_jax.layers.attention import ATTENTION, QUERY_CHUNK, attend
from diffussm_jax.layers.convolution import PYTORCH_INIT, conv, group_norm
from diffussm_jax.layers.embeddings import NUM_TIME_FEATURES, TimeEmbed, sincos_2d, sinusoidal_features
from diffussm_jax.layers.linear import Linear, gelu
from diffussm_jax.layers.norms import AdaLayerNorm

__all__ = [
    "ATTENTION",
    "NUM_TIME_FEATURES",
    "PYTORCH_INIT",
    "QUERY_CHUNK",
    "AdaLayerNorm",
    "Linear",
    "TimeEmbed",
    "attend",
    "conv",
    "gelu",
    "group_norm",
    "sincos_2d",
    "sinusoidal_features",
]
