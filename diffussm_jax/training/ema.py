"""Averages of the parameters: one with a constant decay, and power-function averages for post-hoc EMA."""

import dataclasses

import jax
import jax.numpy as jnp

from diffussm_jax.training.posthoc_ema import power_ema_update
from diffussm_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class EMA:
    """Which averages of the parameters are kept. All start at the parameters.

    Attributes:
      decay: ema <- decay * ema + (1 - decay) * params after every step.
      has_warmup: whether the decay is at most (1 + step) / (10 + step).
      power_sigmas: sigma_rel of each power-function average, as text (EDM2, arXiv 2312.02696).
      part: key of the part of the parameters that is averaged; "": all of them.
    """

    decay: float
    has_warmup: bool = False
    power_sigmas: tuple[str, ...] = ()
    part: str = ""

    def _averaged(self, params):
        return params[self.part] if self.part else params

    def init(self, params) -> dict:
        """The fields of `TrainState` that hold averages; copies, since a step donates every buffer."""
        params = self._averaged(params)

        def copy():
            return jax.tree.map(jnp.copy, params)

        return {"ema_params": copy(), "power_ema": {name: copy() for name in self.power_sigmas}}

    def update(self, state: TrainState, params) -> dict:
        """The same fields after a step from `state` to `params`."""
        params = self._averaged(params)
        decay = jnp.minimum(self.decay, (1 + state.step) / (10 + state.step)) if self.has_warmup else self.decay
        return {
            "ema_params": jax.tree.map(lambda ema, p: decay * ema + (1 - decay) * p, state.ema_params, params),
            "power_ema": {
                name: power_ema_update(ema, params, state.step + 1, sigma_rel=float(name))
                for name, ema in state.power_ema.items()
            },
        }
