"""Sequence mixers: Flax modules that hold the parameters of an SSM and run it over [B, L, D]."""

import flax.linen as nn
import jax

from diffussm_jax.parallel.sharding import over_channels
from diffussm_jax.ssm import DEFAULT_METHOD, init_s4d, ssm_apply, ssm_apply_bidirectional, to_complex


class S4D(nn.Module):
    """S4D (arXiv 2206.11893), in one direction or both: [B, L, D] -> [B, L, R, D], R directions.

    Everything is learned, in float32: Lambda, B, C, dt and the skip D, by directions of their own. The convolution is
    computed in float32 whatever the input's dtype, and returned in that dtype. On a mesh every device computes its own
    batch rows and channels.

    Attributes:
      state_size: N.
      bidirectional: whether a second SSM runs backwards.
      discretization: "zoh" or "bilinear".
      initialization: "legs", "lin" or "inv".
      dt_min: smallest initial step.
      dt_max: largest initial step.
      method: how `ssm_apply` computes it.
      platform: what it is compiled for, as for `ssm_apply`.
    """

    state_size: int = 64
    bidirectional: bool = True
    discretization: str = "zoh"
    initialization: str = "lin"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    method: str = DEFAULT_METHOD
    platform: str | None = None

    @nn.compact
    def __call__(self, u: jax.Array) -> jax.Array:
        def direction(name):
            real = self.param(
                name,
                init_s4d,
                u.shape[-1],
                self.state_size,
                initialization=self.initialization,
                dt_min=self.dt_min,
                dt_max=self.dt_max,
            )
            return to_complex(real)

        options = {"method": self.method, "discretization": self.discretization, "platform": self.platform}

        def apply(directions, u):
            if self.bidirectional:
                y = ssm_apply_bidirectional(*directions, u, **options)
            else:
                y = ssm_apply(*directions, u, **options)
            return y.reshape(*u.shape[:2], len(directions), u.shape[2])

        names = ("forward", "backward") if self.bidirectional else ("forward",)
        return over_channels(apply, [direction(name) for name in names], u)
