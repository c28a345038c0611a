"""A target: the noise with its sign changed, which is the score times sigma."""

from diffussm_jax.diffusion import Noise
from diffussm_jax.registry import register


class ScaledScore:
    divides_by_alpha = True

    def make(self, process, x_0, noise, t):
        return -noise

    def predict(self, process, output, x_t, t):
        return Noise().predict(process, -output, x_t, t)


register("target", "scaled_score", ScaledScore)
