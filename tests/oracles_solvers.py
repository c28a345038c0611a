"""DPM-Solver++, UniPC and Euler in NumPy float64, written from the papers and not from the package.

Each is a function (grid, x_T, outputs, noises) -> the points at which the model is evaluated, and x_0 last. `outputs`
are the model's x_0 of every evaluation, `noises` the standard normals of every step. Only alpha and sigma are those of
the package's processes.
"""

import itertools
import math

import numpy as np


class Grid:
    """alpha, sigma, lambda of a grid of times, float64, with lambda infinite at the data."""

    def __init__(self, process, times):
        self.process, self.t = process, times
        self.alpha, self.sigma = process.alpha(times), process.sigma(times)
        with np.errstate(divide="ignore"):
            self.lambda_ = np.log(self.alpha / self.sigma)

    def first_order(self, i, x, x_0, j=None):
        """From i to j by DPM-Solver++ of first order, which is DDIM, written so that alpha or sigma may be 0."""
        j = i + 1 if j is None else j
        ratio = self.sigma[j] / self.sigma[i]
        return ratio * x + (self.alpha[j] - ratio * self.alpha[i]) * x_0


def dpm_2m(grid, x, outputs, noises):
    """DPM-Solver++, algorithm 2."""
    points, S = [x], len(grid.t) - 1
    for i in range(S):
        D = outputs[i]
        if 0 < i < S - 1 and np.isfinite(grid.lambda_[i - 1]):
            h, h_before = np.diff(grid.lambda_)[[i, i - 1]]
            r = h_before / h
            D = (1 + 1 / (2 * r)) * outputs[i] - 1 / (2 * r) * outputs[i - 1]
        points.append(grid.first_order(i, points[-1], D))
    return points


def dpm_sde_2m(grid, x, outputs, noises):
    """SDE-DPM-Solver++(2M)."""
    points, S = [x], len(grid.t) - 1
    for i in range(S):
        if i == S - 1:
            return [*points, outputs[i]]
        h = grid.lambda_[i + 1] - grid.lambda_[i]
        shrinkage = math.exp(-h)
        D = outputs[i]
        if i > 0 and np.isfinite(grid.lambda_[i - 1]):
            r = (grid.lambda_[i] - grid.lambda_[i - 1]) / h
            D = outputs[i] + (outputs[i] - outputs[i - 1]) / (2 * r)
        mean = grid.sigma[i + 1] / grid.sigma[i] * shrinkage * points[-1] + grid.alpha[i + 1] * (1 - shrinkage**2) * D
        points.append(mean + grid.sigma[i + 1] * math.sqrt(1 - shrinkage**2) * noises[i])


def middles(process, times):
    """The times of 2S between those of the grid, by search; the last step has none."""
    found = []
    for t, s in itertools.pairwise(times[:-1]):
        ends = process.log_snr(np.array([t, s])) / 2
        if np.isinf(ends[0]):
            found.append(s)
            continue
        candidates = np.arange(s, t) if process.num_steps else np.linspace(s, t, 2_000_001)[1:-1]
        found.append(candidates[np.abs(process.log_snr(candidates) / 2 - ends.mean()).argmin()])
    return found


def dpm_2s(grid, x, outputs, noises):
    """DPM-Solver++, algorithm 1; with r = 1 where the first lambda is minus infinity."""
    points, S = [x], len(grid.t) - 1
    x_t = x
    for i, middle in enumerate(middles(grid.process, grid.t)):
        now, later = outputs[2 * i : 2 * i + 2]
        both = Grid(grid.process, np.array([grid.t[i], middle]))
        r = 1.0
        if np.isfinite(grid.lambda_[i]):
            r = (both.lambda_[1] - both.lambda_[0]) / (grid.lambda_[i + 1] - grid.lambda_[i])
        points.append(both.first_order(0, x_t, now))
        x_t = grid.first_order(i, x_t, (1 - 1 / (2 * r)) * now + 1 / (2 * r) * later)
        points.append(x_t)
    return [*points, grid.first_order(S - 1, x_t, outputs[-1])]


def phi(k, z):
    """phi_k(z) of exponential integrators: phi_0 = exp, phi_k = (phi_{k-1} - 1 / (k - 1)!) / z."""
    return math.exp(z) if k == 0 else (phi(k - 1, z) - 1 / math.factorial(k - 1)) / z


def unified(grid, x, outputs, i, p, variant, *, corrects):
    """UniP-p or UniC-p from i to i + 1 with data prediction, as the appendix writes it, of a = R^-1 phi / B."""
    h = grid.lambda_[i + 1] - grid.lambda_[i]
    B = h if variant == "bh1" else 1 - math.exp(-h)
    others = [i - k for k in range(1, p)] + [i + 1] * corrects
    r = np.array([(grid.lambda_[j] - grid.lambda_[i]) / h for j in others])
    K = len(r)
    R = np.array([r ** (n - 1) for n in range(1, K + 1)])
    b = np.array([h * math.factorial(n) * phi(n + 1, -h) / B for n in range(1, K + 1)])
    a = np.array([0.5]) if K == 1 else np.linalg.solve(R, b) if K else []
    D = sum(a_k / r_k * (outputs[j] - outputs[i]) for a_k, r_k, j in zip(a, r, others, strict=True))
    return grid.first_order(i, x, outputs[i]) + grid.alpha[i + 1] * B * D


def unipc(grid, x, outputs, noises, *, order, variant):
    """The authors' loop: the order grows with the evaluations, and falls before the end."""
    points, S = [x], len(grid.t) - 1
    starts_at_noise = np.isinf(grid.lambda_[0])
    for i in range(S):
        p = max(min(order, i + 1 - starts_at_noise, S - i), 1)
        if i == S - 1 or (i == 0 and starts_at_noise):
            x = grid.first_order(i, x, outputs[i])
            points.append(x)
            continue
        points.append(unified(grid, x, outputs, i, p, variant, corrects=False))
        x = unified(grid, x, outputs, i, p, variant, corrects=True)
    return points


def slopes(grid, i):
    """alpha' and sigma' of rectified flow and of GVP, whose alpha and sigma are cosine and sine of pi t / 2."""
    if np.allclose(grid.alpha + grid.sigma, 1):
        return -1.0, 1.0
    return -math.pi / 2 * grid.sigma[i], math.pi / 2 * grid.alpha[i]


def euler(grid, x, outputs, noises, *, churn=0.0):
    """Euler-Maruyama for SiT's reverse SDE, with the score -noise / sigma; DDIM's step in discrete time."""
    points, S = [x], len(grid.t) - 1
    for i in range(S):
        x, noise = points[-1], (points[-1] - grid.alpha[i] * outputs[i]) / grid.sigma[i]
        if grid.process.num_steps:
            x = grid.first_order(i, x, outputs[i])
        else:
            alpha_slope, sigma_slope = slopes(grid, i)
            x = x - (grid.t[i] - grid.t[i + 1]) * (alpha_slope * outputs[i] + sigma_slope * noise)
        if i < S - 1:
            w_dt = churn * grid.sigma[i] * (grid.sigma[i] - grid.sigma[i + 1])
            score = -noise / grid.sigma[i]
            x = x + w_dt / 2 * score + math.sqrt(w_dt) * noises[i]
        points.append(x)
    return points
