"""Weights of the loss by the signal-to-noise ratio SNR = (alpha / sigma)^2.

A weighting is a function of the SNR: the weight of the squared error of x_0. It serves every target, since an error e
of the target is an error c e of the predicted x_0, where c follows from alpha and sigma (`Objective.weight`).
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from diffussm_jax.options import Range, check_options

Weighting = Callable[[jax.Array], jax.Array]


def unweighted() -> None:
    """Every target's own squared error, at every time alike."""


@dataclasses.dataclass(frozen=True)
class MinSNR:
    """min(SNR, gamma), which gives less weight to what is easy (Hang et al., arXiv 2303.09556).

    For the noise that is min(SNR, gamma) / SNR, for v min(SNR, gamma) / (SNR + 1).

    Attributes:
      min_snr_gamma: gamma.

    Raises:
      ValueError: gamma is out of range.
    """

    min_snr_gamma: Annotated[float, Range(1e-3, 1e6)] = 5.0

    def __post_init__(self):
        check_options(self)

    def __call__(self, snr):
        return jnp.minimum(snr, self.min_snr_gamma)


@dataclasses.dataclass(frozen=True)
class P2:
    """SNR / (k + SNR)^gamma, which is 1 / (k + SNR)^gamma for the noise (Choi et al., arXiv 2204.00227).

    Attributes:
      p2_gamma: gamma; 0 is the noise's own squared error.
      p2_k: k.

    Raises:
      ValueError: gamma or k is out of range.
    """

    p2_gamma: Annotated[float, Range(0, 2)] = 1.0
    p2_k: Annotated[float, Range(1e-3, 1e3)] = 1.0

    def __post_init__(self):
        check_options(self)

    def __call__(self, snr):
        return snr / (self.p2_k + snr) ** self.p2_gamma
