"""A depthwise long convolution with a free kernel as a sequence mixer: S4D without its structure."""

from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.options import NOT_AN_OPTION, Range, check_options
from diffussm_jax.parallel.sharding import Rules, over_channels
from diffussm_jax.ssm import from_phases, multiply_adds, to_phases
from diffussm_jax.ssm.fft import convolve_phases


def _init(key: jax.Array, width: int, num_taps: int, length: int) -> dict[str, jax.Array]:
    """Normal kernel [D, K] and skip D [D], so that white noise keeps its variance on the mean over positions.

    Half of it comes from the skip. Position l has min(l + 1, K) taps that reach into the sequence.
    """
    taps_in_sequence = np.minimum(np.arange(length) + 1, num_taps).mean()
    kernel_key, skip_key = jax.random.split(key)
    kernel = jax.random.normal(kernel_key, (width, num_taps), jnp.float32)
    skip = jax.random.normal(skip_key, (width,), jnp.float32)
    return {"kernel": kernel * np.float32(np.sqrt(0.5 / taps_in_sequence)), "D": skip * np.float32(np.sqrt(0.5))}


class Conv(nn.Module):
    """A long convolution in one direction or both: u [B, L, D] -> [B, L, R * D], the forward outputs first.

    Each channel and direction has K learned taps and a skip, forward y_l = sum_{j < K} kernel_j u_{l-j} + D u_l and
    backward y_l = sum_{j < K} kernel_j u_{l+j} + D u_l. It is computed by FFT in float32, and the result has the dtype
    of u. On a mesh every device computes its own batch rows and channels.

    Attributes:
      kernel_size: K; 0 is the L of the initialisation, and then no other L can be used.
      bidirectional: whether a second convolution runs backwards; R is 2 then, else 1.
      platform: "cpu", "gpu" or "tpu", for the length of the FFT; JAX's default backend if None.
    """

    kernel_size: Annotated[int, Range(0)] = 0
    bidirectional: bool = True
    platform: Annotated[str | None, NOT_AN_OPTION] = None
    sharding_rules: ClassVar[Rules] = ((r".", (("tensor", "fsdp"),)),)

    def check(self) -> None:
        """Raises ValueError if an option is not allowed."""
        check_options(self)

    def __call__(self, u: jax.Array, grid: tuple[int, int] | None = None) -> jax.Array:
        """Mixes along L; `grid` is ignored. Raises ValueError if L is not that of a kernel of all positions."""
        return from_phases(self.phases(to_phases(u, 1), grid)).reshape(*u.shape[:2], -1)

    @nn.compact
    def phases(self, u: jax.Array, grid: tuple[int, int] | None = None) -> jax.Array:
        """The same in the layout of the hourglass: u [M, D, B, J] -> [M, R, D, B, J] (`ssm.phases`)."""
        self.check()
        M, D, _, J = u.shape
        L = M * J
        num_taps = self.kernel_size or L
        if self.has_variable("params", "forward"):
            found = self.get_variable("params", "forward")["kernel"].shape[-1]
            if found != num_taps:
                raise ValueError(
                    f"the conv mixer's kernel has {found} taps, and kernel_size = {self.kernel_size} on a sequence of "
                    f"{L} positions needs {num_taps}; a kernel_size other than 0 serves any length"
                )
        names = ("forward", "backward") if self.bidirectional else ("forward",)
        directions = [self.param(name, _init, D, num_taps, L) for name in names]
        reverse = (False, True)[: len(names)]

        def apply(directions, u):
            kernels = jnp.stack([p["kernel"].at[:, 0].add(p["D"]) for p in directions])[..., :L]
            kernels = jnp.pad(kernels, ((0, 0), (0, 0), (0, L - kernels.shape[-1])))
            y = convolve_phases(kernels, u.astype(jnp.float32), reverse=reverse, platform=self._platform)
            return y.astype(u.dtype)

        return over_channels(apply, directions, u)

    @property
    def _platform(self) -> str:
        return jax.default_backend() if self.platform is None else self.platform

    def costs(self, length: int, width: int, dtype: str, num_images: int = 1) -> tuple[str, float | None]:
        """ "fft", and the multiply-adds of a sequence as `ssm.multiply_adds` counts them.

        Args:
          length: L.
          width: D.
          dtype: has no effect, nor has `num_images`.
        """
        num_directions = 2 if self.bidirectional else 1
        return "fft", width * multiply_adds("fft", self._platform, length, 0, num_directions)
