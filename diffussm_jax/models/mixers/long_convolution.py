"""What the mixers that are long convolutions share: S4, LSSL and the free convolution differ in the kernel alone."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffussm_jax.options import NOT_AN_OPTION, check_options
from diffussm_jax.parallel.sharding import Rules, over_channels
from diffussm_jax.ssm import from_phases, multiply_adds, to_phases
from diffussm_jax.ssm.fft import convolve_phases


class LongConvolution(nn.Module, kw_only=True):
    """Base of convolutions in one direction or both by FFT: u [B, L, D] -> [B, L, R * D], the forward outputs first.

    Everything is computed in float32, and the result has the dtype of u. On a mesh every device computes its own batch
    rows and channels.

    Attributes:
      bidirectional: whether a second convolution runs backwards; R is 2 then, else 1.
      platform: "cpu", "gpu" or "tpu", for the length of the FFT; JAX's default backend if None.
    """

    bidirectional: bool = True
    platform: Annotated[str | None, NOT_AN_OPTION] = None
    sharding_rules: ClassVar[Rules] = ((r".", (("tensor", "fsdp"),)),)

    def init_direction(self, key: jax.Array, width: int, length: int) -> Mapping[str, jax.Array]:
        """The parameters of `width` channels of a direction, float32 [D, ..], for sequences of `length`."""
        raise NotImplementedError

    def taps(self, real: Mapping[str, jax.Array], length: int) -> jax.Array:
        """The first `length` taps of the kernel of such parameters, with the skip at lag 0: [D, L] float32."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises ValueError if an option is not allowed."""
        check_options(self)

    def __call__(self, u: jax.Array, grid: tuple[int, int] | None = None) -> jax.Array:
        """Mixes along L; `grid` is ignored."""
        return from_phases(self.phases(to_phases(u, 1), grid)).reshape(*u.shape[:2], -1)

    @nn.compact
    def phases(self, u: jax.Array, grid: tuple[int, int] | None = None) -> jax.Array:
        """The same in the layout of the hourglass: u [M, D, B, J] -> [M, R, D, B, J] (`ssm.phases`)."""
        self.check()
        names = ("forward", "backward") if self.bidirectional else ("forward",)
        length = u.shape[0] * u.shape[3]
        directions = [self.param(name, self.init_direction, u.shape[1], length) for name in names]
        reverse = (False, True)[: len(names)]

        def apply(directions, u):
            # The kernels of all directions at once, as channels.
            real = jax.tree.map(lambda *x: jnp.concatenate(x), *directions)
            kernels = self.taps(real, length).reshape(len(names), u.shape[1], -1)
            y = convolve_phases(kernels, u.astype(jnp.float32), reverse=reverse, platform=self._platform)
            return y.astype(u.dtype)

        return over_channels(apply, directions, u)

    @property
    def _platform(self) -> str:
        return jax.default_backend() if self.platform is None else self.platform

    def costs(self, length: int, width: int, dtype: str, num_images: int = 1) -> tuple[str, float | None]:
        """ "fft", and the multiply-adds of a sequence as `ssm.multiply_adds` counts them, the kernel's excluded.

        Args:
          length: L.
          width: D.
          dtype: has no effect, nor has `num_images`.
        """
        num_directions = 2 if self.bidirectional else 1
        return "fft", width * multiply_adds("fft", self._platform, length, 0, num_directions)
