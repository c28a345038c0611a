"""DiffuSSM in JAX: diffusion with bidirectional state-space models in place of attention (arXiv 2311.18257)."""
