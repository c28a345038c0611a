"""The state-space core in plain JAX, no Flax: diagonal SSMs (S4D), and S4, LSSL and selective SSMs beside them.

Dimensions in the whole package:

    B  batch          H W C  height, width, channels of the (latent) image
    L  sequence       N      real state size, held as N/2 conjugate pairs
    D  channels       J M    tokens of the residual stream, hourglass ratio: L = J * M

Mathematical names follow the papers: `Lambda` is the diagonal state matrix, `dt` the step size, and the suffix `_bar`
marks a discretised quantity. Each channel is a linear system (S4D, arXiv 2206.11893, section 3)

    x'(t) = Lambda x(t) + B u(t),    y(t) = 2 Re(C . x(t)) + D u(t)

Its discretisation is the convolution of `u` with K[l] = 2 Re sum_n C_n B_bar_n Lambda_bar_n**l. Parameters, states and
sums are float32 (complex64) for every input dtype.
"""

from diffussm_jax.ssm.apply import DEFAULT_METHOD, METHODS, ssm_apply, ssm_apply_bidirectional, ssm_apply_phases
from diffussm_jax.ssm.auto import fastest_method
from diffussm_jax.ssm.costs import multiply_adds
from diffussm_jax.ssm.discretize import DISCRETIZATIONS, bilinear, zoh
from diffussm_jax.ssm.dplr import DPLRParams, dplr_kernel, dplr_step, init_s4, to_dplr
from diffussm_jax.ssm.hippo import dplr_legs, s4d_inv, s4d_legs, s4d_lin, s4d_random
from diffussm_jax.ssm.kernel import diagonal_kernel
from diffussm_jax.ssm.lssl import LSSLParams, init_lssl, lssl_kernel, lssl_step, to_lssl
from diffussm_jax.ssm.params import INITIALIZATIONS, SSMParams, init_s4d, to_complex
from diffussm_jax.ssm.phases import from_phases, to_phases
from diffussm_jax.ssm.recurrent import initial_state, step
from diffussm_jax.ssm.selective import selective_scan, selective_step

__all__ = [
    "DEFAULT_METHOD",
    "DISCRETIZATIONS",
    "INITIALIZATIONS",
    "METHODS",
    "DPLRParams",
    "LSSLParams",
    "SSMParams",
    "bilinear",
    "diagonal_kernel",
    "dplr_kernel",
    "dplr_legs",
    "dplr_step",
    "fastest_method",
    "from_phases",
    "init_lssl",
    "init_s4",
    "init_s4d",
    "initial_state",
    "lssl_kernel",
    "lssl_step",
    "multiply_adds",
    "s4d_inv",
    "s4d_legs",
    "s4d_lin",
    "s4d_random",
    "selective_scan",
    "selective_step",
    "ssm_apply",
    "ssm_apply_bidirectional",
    "ssm_apply_phases",
    "step",
    "to_complex",
    "to_dplr",
    "to_lssl",
    "to_phases",
    "zoh",
]
