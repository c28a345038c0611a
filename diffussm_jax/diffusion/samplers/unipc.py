"""UniPC: a predictor and a corrector that shares its evaluations (Zhao et al., arXiv 2302.04867), with data prediction.

In the notation of `dpm_solver`, both replace x_0 in the integral by a polynomial in lambda. With m_0 the prediction
at t and m_k those at lambda_t + r_k h,

    x_s = sigma_s / sigma_t x_t + alpha_s [(1 - e^-h) m_0 + sum_k w_k (m_k - m_0)],
    sum_k w_k r_k^n = int_0^h e^(tau - h) (tau / h)^n dtau,  n = 1 ... K.

The predictor UniP-p takes the p - 1 predictions before t (all r_k < 0). The corrector UniC-p takes the one at s too
(r = 1), once the model was evaluated at the predicted x_s; it replaces x_s, and the model is not evaluated again. It
raises the order from p to p + 1.

Theorem 3.1 asks for these moments only up to the order of the method. With K = 1 the paper takes w_1 = B(h) / (2 r_1)
instead; with more points it solves the equations, and its B cancels. UniPC-1's first step has an error of h^3, so that
order 4 of UniPC-3 is seen only if the first step is short, as in the grid `karras`.

The order grows from 1 over the first steps and falls to 1 over the last, as in the authors' code. The last step, to
the data, has no corrector. If alpha is 0 at the first time, the first step is DDIM's, and starts no polynomial.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffussm_jax.options import Choices, Range, check_options

_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(40)  # closed forms of the moments lose digits at small h


class Row(NamedTuple):
    """Weights of one step: of x_t, of x at the time before t, and of x_0 at t and at times before it.

    corrected = correct_x_t x_t + correct_x_before x_before + sum_k correct[k] m_k, and
    x_s = predict_x_t corrected + sum_k predict[k] m_k, with m_0 at t, m_1 before it, and so on.
    """

    t: np.ndarray
    correct_x_t: np.ndarray  # [S]: 1 where nothing is corrected, else 0
    correct_x_before: np.ndarray
    correct: np.ndarray  # [S, order + 1]
    predict_x_t: np.ndarray
    predict: np.ndarray  # [S, order]


@dataclasses.dataclass(frozen=True)
class UniPC:
    """Order + 1, with one evaluation a step.

    Attributes:
      order: p of UniPC-p. The authors advise 2 with guidance and 3 without.
      variant: the function B(h), h for "bh1" and 1 - exp(-h) for "bh2". The authors advise "bh2", except without
        guidance in fewer than 10 steps.

    Raises:
      ValueError: an option is not allowed.
    """

    order: Annotated[int, Range(1, 3)] = 2
    variant: Annotated[str, Choices(("bh1", "bh2"))] = "bh2"
    is_stochastic = False

    def __post_init__(self):
        check_options(self)

    def plan(self, process, times):
        S = len(times) - 1
        alpha, sigma, lambda_ = process.alpha(times), process.sigma(times), process.log_snr(times) / 2
        ratio = sigma[1:] / sigma[:-1]
        num_known = np.arange(1, S + 1) - np.isinf(lambda_[0])  # predictions at a finite lambda
        orders = np.clip(np.minimum(num_known, np.arange(S, 0, -1)), 1, self.order)
        correct_x_t, correct_x_before = np.ones(S), np.zeros(S)
        correct, predict = np.zeros((S, self.order + 1)), np.zeros((S, self.order))
        for i, order in enumerate(orders):
            known = lambda_[i + 1 - order : i + 1][::-1]
            predict[i, :order] = alpha[i + 1] * self._weights(known, lambda_[i + 1], order - 1)
            if i + 1 < S and np.isfinite(lambda_[i]):
                with_next = np.append(lambda_[i + 1], known)
                correct_x_t[i + 1], correct_x_before[i + 1] = 0, ratio[i]
                correct[i + 1, : order + 1] = alpha[i + 1] * self._weights(with_next, lambda_[i + 1], order, of_m_0=1)
        return Row(times[:-1], correct_x_t, correct_x_before, correct, ratio, predict)

    def _weights(self, known, lambda_s, num_others, of_m_0=0):
        """Weights of the predictions at the half log-SNRs `known`, of which `of_m_0` is the place of m_0."""
        weights = np.zeros(num_others + 1)
        h = lambda_s - known[of_m_0]
        others = np.delete(np.arange(num_others + 1), of_m_0)
        if num_others:
            weights[others] = self._weights_of_differences((known[others] - known[of_m_0]) / h, h)
        weights[of_m_0] = -np.expm1(-h) - weights[others].sum()
        return weights

    def _weights_of_differences(self, r, h):
        """w_1 ... w_K."""
        if len(r) == 1:
            return (h if self.variant == "bh1" else -np.expm1(-h)) / (2 * r)
        n = np.arange(1, len(r) + 1)[:, None]
        moments = (_NODE_WEIGHTS / 2 * h * np.exp((_NODES - 1) / 2 * h) * ((_NODES + 1) / 2) ** n).sum(1)
        return np.linalg.solve(r**n, moments)

    def init(self, x_T):
        return x_T, x_T, *(jnp.zeros_like(x_T),) * self.order

    def step(self, denoise, carry, row, key):
        x_t, x_before, *outputs = carry
        outputs = (denoise(x_t, row.t).x_0, *outputs)
        x_t = row.correct_x_t * x_t + row.correct_x_before * x_before + _dot(row.correct, outputs)
        return row.predict_x_t * x_t + _dot(row.predict, outputs[:-1]), x_t, *outputs[:-1]


def _dot(weights, outputs):
    return sum(weights[k] * output for k, output in enumerate(outputs))
