"""S4D, a diagonal state-space layer (Gu et al., arXiv 2206.11893), as a Flax module."""

from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffussm_jax.options import CHANGEABLE_ON_RESUME, NOT_AN_OPTION, Choices, Range, check_options
from diffussm_jax.parallel.sharding import Rules, over_channels
from diffussm_jax.ssm import (
    DEFAULT_METHOD,
    DISCRETIZATIONS,
    INITIALIZATIONS,
    METHODS,
    fastest_method,
    from_phases,
    init_s4d,
    multiply_adds,
    ssm_apply_phases,
    to_complex,
    to_phases,
)

SCANS = ("raster", "2d", "zigzag")


class S4D(nn.Module):
    """S4D in one direction or both: u [B, L, D] -> [B, L, R * D], the forward outputs and then the backward ones.

    Lambda, B, C, dt and the skip D are learned in float32, separately for each direction. States and sums are float32
    whatever the dtype of the input, and the result has that dtype. On a mesh every device computes its own batch rows
    and channels.

    With scan = "2d" another SSM of each direction runs over the positions column by column, and the outputs of a
    direction are added: y = S4D(u) + transpose(S4D_column(transpose(u))). This is ours, after VMamba
    (arXiv 2401.10166), which adds up four such scans.

    With scan = "zigzag" every other row is reversed, so that neighbours in the sequence are neighbours in the image.
    This is ours, after ZigMa (arXiv 2403.13802), which changes the path from layer to layer.

    Example, in a model of your own:

        class Classifier(nn.Module):
            @nn.compact
            def __call__(self, u):                                 # [B, L, D]
                y = S4D(state_size=16)(nn.LayerNorm()(u))          # [B, L, 2 D]
                return nn.Dense(10)(nn.gelu(y).mean(1))            # [B, 10]

    Attributes:
      state_size: N, even.
      scan: "raster" (row by row), "2d" or "zigzag".
      bidirectional: whether a second SSM runs backwards; R is 2 then, else 1.
      discretization: "zoh" or "bilinear".
      initialization: "legs", "lin", "inv" or "random".
      method: how `ssm_apply` computes it.
      dt_min: smallest initial step.
      dt_max: largest initial step.
      platform: "cpu", "gpu" or "tpu", for method "auto"; JAX's default backend if None.
    """

    state_size: Annotated[int, Range(2)] = 64
    scan: Annotated[str, Choices(SCANS)] = "raster"
    bidirectional: bool = True
    discretization: Annotated[str, Choices(DISCRETIZATIONS)] = "zoh"
    initialization: Annotated[str, Choices(INITIALIZATIONS)] = "lin"
    method: Annotated[str, Choices(METHODS), CHANGEABLE_ON_RESUME] = DEFAULT_METHOD
    dt_min: Annotated[float, Range(1e-12)] = 1e-3
    dt_max: Annotated[float, Range(1e-12)] = 1e-1
    platform: Annotated[str | None, NOT_AN_OPTION] = None
    sharding_rules: ClassVar[Rules] = ((r".", (("tensor", "fsdp"),)),)

    def check(self) -> None:
        """Raises ValueError if an option is not allowed or the state size is odd."""
        check_options(self)
        if self.state_size % 2:
            raise ValueError(f"state_size must be even, got {self.state_size}")

    def __call__(self, u: jax.Array, grid: tuple[int, int] | None = None) -> jax.Array:
        """Mixes along L. `grid` = (H, W) is needed with scan = "2d" or "zigzag"."""
        y = from_phases(self.phases(to_phases(u, 1), grid))
        return y.reshape(*u.shape[:2], -1)

    @nn.compact
    def phases(self, u: jax.Array, grid: tuple[int, int] | None = None) -> jax.Array:
        """The same in the layout of the hourglass: u [M, D, B, J] -> [M, R, D, B, J] (`ssm.phases`)."""
        self.check()
        if self.scan != "raster" and grid is None:
            raise ValueError(f'scan = "{self.scan}" needs grid = (H, W)')

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
            if self.scan == "zigzag":
                return _zigzag(scan(scans[0], _zigzag(u, *grid)), *grid)
            y = scan(scans[0], u)
            if len(scans) > 1:
                H, W = grid
                y += _transpose(scan(scans[1], _transpose(u, H, W)), W, H)
            return y

        names = ("forward", "backward") if self.bidirectional else ("forward",)
        scans = [[direction(name) for name in names]]
        if self.scan == "2d":
            scans.append([direction(f"column_{name}") for name in names])
        return over_channels(apply, scans, u)

    def costs(self, length: int, width: int, dtype: str, num_images: int = 1) -> tuple[str, float | None]:
        """The method that computes a sequence, "auto" resolved, and its multiply-adds; None if they are not counted.

        Args:
          length: L.
          width: D.
          dtype: of the input, by name.
          num_images: sequences that a device computes together, which decides on the size of chunks.
        """
        platform = jax.default_backend() if self.platform is None else self.platform
        method = self.method
        if method == "auto":
            method = fastest_method(platform, dtype, length, width, self.state_size)
        num_directions, num_scans = 2 if self.bidirectional else 1, 2 if self.scan == "2d" else 1
        of_channel = multiply_adds(method, platform, length, self.state_size, num_directions, num_sequences=num_images)
        return method, None if of_channel is None else num_scans * width * of_channel


def _transpose(u: jax.Array, height: int, width: int) -> jax.Array:
    """[M, .., D, B, J] of positions row by row, to the same of positions column by column."""
    x = from_phases(u)
    x = x.reshape(x.shape[0], height, width, *x.shape[2:]).swapaxes(1, 2)
    return to_phases(x.reshape(x.shape[0], -1, *x.shape[3:]), u.shape[0])


def _zigzag(u: jax.Array, height: int, width: int) -> jax.Array:
    """Reverses every other row of positions in phases [M, .., J]; twice is the identity.

    Position w = j M + m of a row changes places with W - 1 - w, which is at m' = M - 1 - m of token j' = W/M - 1 - j.
    """
    if width % u.shape[0]:
        raise ValueError(f'scan = "zigzag" needs a width W that is a multiple of M = {u.shape[0]}, got {width}')
    rows = u.reshape(*u.shape[:-1], height, -1)
    is_reversed = (jnp.arange(height) % 2 == 1)[:, None]
    return jnp.where(is_reversed, jnp.flip(rows, (0, -1)), rows).reshape(u.shape)
