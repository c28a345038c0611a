"""Sequence mixers: Flax modules that hold the parameters of an SSM and run it over L = J M positions, in M phases."""

import flax.linen as nn
import jax

from diffussm_jax.parallel.sharding import over_channels
from diffussm_jax.ssm import DEFAULT_METHOD, from_phases, init_s4d, ssm_apply_phases, to_complex, to_phases


class S4D(nn.Module):
    """S4D (arXiv 2206.11893), in one direction or both: [M, D, B, J] -> [M, R, D, B, J], R directions.

    Position j M + m is at j of phase m (`ssm.phases`), which is how an hourglass makes it; [B, L, D] is a single phase,
    `to_phases(u, 1)`.

    Everything is learned, in float32: Lambda, B, C, dt and the skip D, by directions of their own. States and sums are
    float32 whatever the input's dtype, and the result is of that dtype (`ssm_apply`). On a mesh every device computes
    its own batch rows and channels.

    With a grid, as many SSMs again run over its positions column by column, and each direction's output is the sum of
    both: y = S4D(u) + transpose(S4D_column(transpose(u))). That is ours, after VMamba (arXiv 2401.10166), which adds up
    four such scans.

    Attributes:
      state_size: N.
      grid: (H, W) of the L = H W positions, which come row by row, to scan them column by column too; or None.
      bidirectional: whether a second SSM runs backwards.
      discretization: "zoh" or "bilinear".
      initialization: "legs", "lin" or "inv".
      dt_min: smallest initial step.
      dt_max: largest initial step.
      method: how `ssm_apply` computes it.
      platform: what it is compiled for, as for `ssm_apply`.
    """

    state_size: int = 64
    grid: tuple[int, int] | None = None
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
                u.shape[1],
                self.state_size,
                initialization=self.initialization,
                dt_min=self.dt_min,
                dt_max=self.dt_max,
            )
            return to_complex(real)

        options = {"method": self.method, "discretization": self.discretization, "platform": self.platform}

        def scan(directions, u):
            return ssm_apply_phases(directions, u, reverse=(False, True)[: len(directions)], **options)

        def apply(scans, u):
            y = scan(scans[0], u)
            if self.grid:
                H, W = self.grid
                y += _transpose(scan(scans[1], _transpose(u, H, W)), W, H)
            return y

        names = ("forward", "backward") if self.bidirectional else ("forward",)
        scans = [[direction(name) for name in names]]
        if self.grid:
            scans.append([direction(f"column_{name}") for name in names])
        return over_channels(apply, scans, u)


def _transpose(u: jax.Array, height: int, width: int) -> jax.Array:
    """[M, .., D, B, J] of positions that come row by row, to the same of positions column by column."""
    x = from_phases(u)
    x = x.reshape(x.shape[0], height, width, *x.shape[2:]).swapaxes(1, 2)
    return to_phases(x.reshape(x.shape[0], -1, *x.shape[3:]), u.shape[0])
