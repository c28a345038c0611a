"""Sequence mixers: Flax modules that hold the parameters of an SSM and run it over [B, L, D]."""

import flax.linen as nn
import jax

from diffussm_jax.ssm import DEFAULT_METHOD, init_s4d, ssm_apply, ssm_apply_bidirectional, to_complex


class S4D(nn.Module):
    """S4D (arXiv 2206.11893), in one direction or both: [B, L, D] -> [B, L, D], or [B, L, 2D] bidirectional.

    Everything is learned, in float32: Lambda, B, C, dt and the skip D, by directions of their own. The convolution is
    computed in float32 whatever the input's dtype, and returned in that dtype.

    Attributes:
      state_size: N.
      bidirectional: whether a second SSM runs backwards.
      discretization: "zoh" or "bilinear".
      initialization: "legs", "lin" or "inv".
      dt_min: smallest initial step.
      dt_max: largest initial step.
      method: how `ssm_apply` computes it.
    """

    state_size: int = 64
    bidirectional: bool = True
    discretization: str = "zoh"
    initialization: str = "lin"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    method: str = DEFAULT_METHOD

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

        options = {"method": self.method, "discretization": self.discretization}
        if self.bidirectional:
            return ssm_apply_bidirectional(direction("forward"), direction("backward"), u, **options)
        return ssm_apply(direction("forward"), u, **options)
