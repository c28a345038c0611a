"""Conditioners: Flax modules that turn a value of the batch into what a backbone can use.

A factory is called with `width`, `dtype` and `name`, which the backbone knows, and so a conditioner has these fields
beside its own options.
"""

from diffussm_jax.models.conditioners.base import Conditioner, Conditioning
from diffussm_jax.models.conditioners.label import LabelEmbed

__all__ = ["Conditioner", "Conditioning", "LabelEmbed"]
