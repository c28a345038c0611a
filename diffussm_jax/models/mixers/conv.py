"""A depthwise long convolution with a free kernel as a sequence mixer: S4D without its structure."""

from collections.abc import Mapping
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.models.mixers.long_convolution import LongConvolution
from diffussm_jax.options import Range


class Conv(LongConvolution):
    """A long convolution in one direction or both: u [B, L, D] -> [B, L, R * D], the forward outputs first.

    Each channel and direction has K learned taps and a skip, forward y_l = sum_{j < K} kernel_j u_{l-j} + D u_l and
    backward y_l = sum_{j < K} kernel_j u_{l+j} + D u_l. It is computed by FFT in float32, and the result has the dtype
    of u. On a mesh every device computes its own batch rows and channels.

    Attributes:
      kernel_size: K; 0 is the L of the initialisation, and then no other L can be used.
    """

    kernel_size: Annotated[int, Range(0)] = 0

    def phases(self, u: jax.Array, grid: tuple[int, int] | None = None) -> jax.Array:
        """As `LongConvolution.phases`. Raises ValueError if L is not that of a kernel of all positions."""
        length = u.shape[0] * u.shape[3]
        num_taps = self.kernel_size or length
        if self.has_variable("params", "forward"):
            found = self.get_variable("params", "forward")["kernel"].shape[-1]
            if found != num_taps:
                raise ValueError(
                    f"the conv mixer's kernel has {found} taps, and kernel_size = {self.kernel_size} on a sequence of "
                    f"{length} positions needs {num_taps}; a kernel_size other than 0 serves any length"
                )
        return super().phases(u, grid)

    def init_direction(self, key: jax.Array, width: int, length: int) -> dict[str, jax.Array]:
        """Normal kernel [D, K] and skip D [D], so that white noise keeps its variance on the mean over positions.

        Half of it comes from the skip. Position l has min(l + 1, K) taps that reach into the sequence.
        """
        num_taps = self.kernel_size or length
        taps_in_sequence = np.minimum(np.arange(length) + 1, num_taps).mean()
        kernel_key, skip_key = jax.random.split(key)
        kernel = jax.random.normal(kernel_key, (width, num_taps), jnp.float32)
        skip = jax.random.normal(skip_key, (width,), jnp.float32)
        return {"kernel": kernel * np.float32(np.sqrt(0.5 / taps_in_sequence)), "D": skip * np.float32(np.sqrt(0.5))}

    def taps(self, real: Mapping[str, jax.Array], length: int) -> jax.Array:
        """The learned taps, with the skip, filled up with zeros."""
        kernel = real["kernel"].at[:, 0].add(real["D"])[:, :length]
        return jnp.pad(kernel, ((0, 0), (0, length - kernel.shape[-1])))
