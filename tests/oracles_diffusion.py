"""What a diffusion process should compute, in NumPy float64, written from the papers and not from the package.

DDPM is arXiv 2006.11239, Improved DDPM arXiv 2102.09672, DDIM arXiv 2010.02502, rectified flow arXiv 2209.03003, SiT
arXiv 2401.08740, the schedules with a terminal SNR of zero arXiv 2305.08891 (Lin et al.). Where
the papers leave a choice, it is that of ADM (arXiv 2105.05233) and DiT (arXiv 2212.09748): the posterior variance at
t = 0 is replaced by that at t = 1, the normal distribution function is the tanh approximation, the VLB term is in bits
per dimension and has weight 1.

DDPM's process is its vector of betas. A `Step` holds what a reverse step of any process needs. The posterior comes from
Bayes' rule and not from the papers' coefficients, so that it checks them. Functions take a batch x [B, ...] with t [B],
or one x with a scalar t.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np


def float64(*arrays):
    """The arrays in float64: float32 ones would stay so beside Python's numbers."""
    return tuple(np.asarray(array, np.float64) for array in arrays)


def column(values, x):
    """Values of t, [B] or scalar, shaped to broadcast against x."""
    values = np.asarray(values, np.float64)
    return values.reshape(values.shape + (1,) * (np.ndim(x) - values.ndim if values.ndim else 0))


def mean_of_rows(values):
    """The mean of each row of a batch [B, ...]."""
    return values.reshape(len(values), -1).mean(1)


# Schedules


def linear_betas(num_steps):
    """DDPM, section 4, for 1000 steps; for others ADM multiplies both ends by 1000 / num_steps."""
    first, last = 0.1 / num_steps, 20 / num_steps
    return np.array([first + (last - first) * i / (num_steps - 1) for i in range(num_steps)])


def cosine_alpha_bar(fraction):
    """Improved DDPM, equation 17, before it is divided by its value at 0; `fraction` is t / T."""
    return math.cos((fraction + 0.008) / (1 + 0.008) * math.pi / 2) ** 2


def cosine_betas(num_steps):
    """Improved DDPM, section 3.2."""
    values = [cosine_alpha_bar(i / num_steps) for i in range(num_steps + 1)]
    return np.array([min(1 - after / before, 0.999) for before, after in itertools.pairwise(values)])


def zero_terminal_snr_betas(betas):
    """Lin et al., algorithm 1, one line after the other."""
    alphas = [1 - beta for beta in betas]
    sqrt_alpha_bar = [math.sqrt(math.prod(alphas[: i + 1])) for i in range(len(alphas))]
    first, last = sqrt_alpha_bar[0], sqrt_alpha_bar[-1]
    shifted = [value - last for value in sqrt_alpha_bar]
    scaled = [value * first / (first - last) for value in shifted]
    alpha_bars = [value**2 for value in scaled]
    alphas = [alpha_bars[0], *(now / before for before, now in itertools.pairwise(alpha_bars))]
    return np.array([1 - alpha for alpha in alphas])


def log_alpha_bar(betas, t):
    """The logarithm of the product of 1 - beta up to and with t; 0 for t = -1."""
    with np.errstate(divide="ignore"):  # a last beta of 1
        return np.append(0.0, np.cumsum(np.log1p(-betas)))[np.asarray(t) + 1]


def alpha_bar(betas, t):
    """The product of 1 - beta up to and with t; 1 for t = -1."""
    return np.exp(log_alpha_bar(betas, t))


def adm_timesteps(num_steps, num_kept):
    """ADM's space_timesteps for a single section of at least two steps, without its accumulated rounding."""
    return [round(i * (num_steps - 1) / (num_kept - 1)) for i in range(num_kept)]


def respaced_betas(betas, kept):
    """Improved DDPM, section 4: beta = 1 - alpha_bar / (alpha_bar of the step kept before)."""
    values = np.append(1.0, alpha_bar(betas, kept))
    return 1 - values[1:] / values[:-1]


# The forward process and the reverse step


class Step(NamedTuple):
    """x_t = alpha x_0 + sigma noise, the same before it, and the variance beta of q(x_t | x_before)."""

    alpha: np.ndarray
    sigma: np.ndarray
    alpha_before: np.ndarray
    sigma_before: np.ndarray
    beta: np.ndarray


def ddpm_step(betas, t, before):
    """From t to `before` < t, -1 for the data (DDPM, equation 4; Improved DDPM, section 4, for beta)."""
    log_now, log_before = log_alpha_bar(betas, t), log_alpha_bar(betas, before)
    sigma, sigma_before = np.sqrt(-np.expm1(log_now)), np.sqrt(-np.expm1(log_before))
    return Step(np.exp(log_now / 2), sigma, np.exp(log_before / 2), sigma_before, -np.expm1(log_now - log_before))


def flow_step(t, before):
    """From t to `before` in rectified flow; beta makes up what the shrunk noise of `before` lacks."""
    slope = (1 - t) / (1 - before)
    return Step(1 - t, t, 1 - before, before, t**2 - (slope * before) ** 2)


def gvp_step(t, before):
    """From t to `before` on SiT's GVP path, a quarter of a circle."""
    alpha, sigma, alpha_before, sigma_before = (f(np.pi / 2 * s) for s in (t, before) for f in (np.cos, np.sin))
    return Step(alpha, sigma, alpha_before, sigma_before, sigma**2 - (alpha / alpha_before * sigma_before) ** 2)


def q_sample(step, x_0, noise):
    """DDPM, equation 4."""
    x_0, noise = float64(x_0, noise)
    return column(step.alpha, x_0) * x_0 + column(step.sigma, x_0) * noise


def q_posterior(step, x_0, x_t):
    """Mean and variance of q(x_before | x_t, x_0): the prior q(x_before | x_0) times the likelihood q(x_t | x_before).

    The precisions add; both are multiplied here by the two variances, one of which is 0 at t = 0.
    """
    x_0, x_t = float64(x_0, x_t)
    alpha, _, alpha_before, sigma_before, beta = (column(values, x_0) for values in step)
    slope, prior_mean, prior_variance = alpha / alpha_before, alpha_before * x_0, sigma_before**2
    precisions = beta + slope**2 * prior_variance
    return (beta * prior_mean + prior_variance * slope * x_t) / precisions, prior_variance * beta / precisions


def posterior_variance(step):
    """The variance alone."""
    return q_posterior(step, np.zeros(np.shape(step.beta)), 0.0)[1]


def variance_bounds(betas, t):
    """The two ends of the learned range for a step from t to t - 1 (Improved DDPM, section 3.1)."""
    from_1 = np.maximum(t, 1)
    return posterior_variance(ddpm_step(betas, from_1, from_1 - 1)), betas[t]


# Targets: each is p x_0 + q noise


TARGETS = {
    "noise": lambda alpha, sigma: (0 * alpha, 0 * alpha + 1),
    "x_0": lambda alpha, sigma: (0 * alpha + 1, 0 * alpha),
    "v": lambda alpha, sigma: (-sigma, alpha),
    "velocity": lambda alpha, sigma: (0 * alpha - 1, 0 * alpha + 1),
    "velocity of GVP": lambda alpha, sigma: (-np.pi / 2 * sigma, np.pi / 2 * alpha),
}


def target(name, step, x_0, noise):
    """The value of a target."""
    x_0, noise = float64(x_0, noise)
    p, q = (column(values, x_0) for values in TARGETS[name](step.alpha, step.sigma))
    return p * x_0 + q * noise


def x_0_and_noise(name, step, value, x_t):
    """The solution of x_t = alpha x_0 + sigma noise and value = p x_0 + q noise, by Cramer's rule."""
    value, x_t = float64(value, x_t)
    alpha, sigma = column(step.alpha, x_t), column(step.sigma, x_t)
    p, q = (column(values, x_t) for values in TARGETS[name](step.alpha, step.sigma))
    determinant = alpha * q - sigma * p
    return (q * x_t - sigma * value) / determinant, (alpha * value - p * x_t) / determinant


# The learned reverse step and the loss


def p_mean_variance(step, bounds, output, x_t, *, target="noise", clip_x_0=False):
    """Mean and log variance of p(x_before | x_t), predicted x_0 and noise, of a model's output [..., 2C].

    `bounds` are those of the variance, which is learned between them.
    """
    output, x_t = float64(output, x_t)
    value, raw = np.split(output, 2, -1)
    x_0, noise = x_0_and_noise(target, step, value, x_t)
    if clip_x_0:
        x_0 = np.minimum(np.maximum(x_0, -1), 1)
        noise = (x_t - column(step.alpha, x_t) * x_0) / column(step.sigma, x_t)
    mean, _ = q_posterior(step, x_0, x_t)
    lower, upper = (np.log(column(bound, x_t)) for bound in bounds)
    v = (raw + 1) / 2
    return mean, v * upper + (1 - v) * lower, x_0, noise


def approximate_normal_cdf(z):
    """ADM's approximation (Page 1977)."""
    return (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2


def exact_normal_cdf(z):
    """The normal distribution function."""
    return np.vectorize(lambda value: math.erfc(-value / math.sqrt(2)) / 2)(z)


def discretized_log_likelihood(x, mean, log_variance, cdf=approximate_normal_cdf):
    """DDPM, equation 13, in nats: the mass between x - 1/255 and x + 1/255, open beyond +-1, at least 1e-12."""
    x, mean, log_variance = float64(x, mean, log_variance)
    deviation = np.exp(log_variance / 2)
    upper = np.where(x > 0.999, 1.0, cdf((x + 1 / 255 - mean) / deviation))
    lower = np.where(x < -0.999, 0.0, cdf((x - 1 / 255 - mean) / deviation))
    return np.log(np.maximum(upper - lower, 1e-12))


def normal_kl(mean_q, variance_q, mean_p, variance_p):
    """KL(q || p) of two normal distributions, in nats."""
    return (variance_q + (mean_q - mean_p) ** 2) / (2 * variance_p) + np.log(variance_p / variance_q) / 2 - 0.5


def vlb_elements(betas, output, x_0, x_t, t, *, target="noise"):
    """The term of the variational bound at t [B] for each element (DDPM, equation 5), in bits; the loss is the mean."""
    step = ddpm_step(betas, t, t - 1)
    mean, log_variance, _, _ = p_mean_variance(step, variance_bounds(betas, t), output, x_t, target=target)
    nll = -discretized_log_likelihood(x_0, mean, log_variance)
    q_mean, q_variance = q_posterior(step, x_0, x_t)
    is_first = column(t, x_0) == 0
    kl = normal_kl(q_mean, np.where(is_first, 1, q_variance), mean, np.exp(log_variance))
    return np.where(is_first, nll, kl) / math.log(2)


def mse_term(value, target):
    """DDPM, equation 14, for each row."""
    value, target = float64(value, target)
    return mean_of_rows((value - target) ** 2)


# Samplers


def ddim_deviation(step, eta):
    """DDIM, equation 16, with 1 - alpha_bar_t / alpha_bar_{t-1} = beta."""
    return eta * step.sigma_before / step.sigma * np.sqrt(step.beta)


def ddim_update(step, x_0, predicted_noise, noise=0.0, eta=0.0):
    """x_before of DDIM, equation 12."""
    deviation = ddim_deviation(step, eta)
    direction = math.sqrt(max(step.sigma_before**2 - deviation**2, 0))
    return step.alpha_before * x_0 + direction * predicted_noise + deviation * noise


def heun_update(step, x_t, slope, slope_before):
    """x_before by the trapezoid rule for the two slopes noise - x_0, in rectified flow's coordinates."""
    total, total_before = step.alpha + step.sigma, step.alpha_before + step.sigma_before
    width = step.sigma_before / total_before - step.sigma / total
    return total_before * (x_t / total + width * (slope + slope_before) / 2)


# A target N(mean, deviation^2), whose reverse process is known


def marginal(alpha, sigma, mean, deviation):
    """Mean and variance of q(x_t)."""
    return alpha * mean, alpha**2 * deviation**2 + sigma**2


def optimal_prediction(alpha, sigma, mean, deviation, x_t):
    """E[x_0 | x_t] and E[noise | x_t]."""
    center, variance = marginal(alpha, sigma, mean, deviation)
    score = (center - x_t) / variance
    return mean - alpha * deviation**2 * score, -sigma * score


def optimal_reverse_variance(step, mean, deviation):
    """The variance of q(x_before | x_t), with x_0 integrated out; not at t = 0."""
    _, before = marginal(step.alpha_before, step.sigma_before, mean, deviation)
    return 1 / (1 / before + (step.alpha / step.alpha_before) ** 2 / step.beta)


def probability_flow(alpha, sigma, mean, deviation, x_T):
    """x_0 of the probability-flow ODE from x_T: its flow keeps each point's standard score."""
    center, variance = marginal(alpha, sigma, mean, deviation)
    return mean + deviation * (x_T - center) / math.sqrt(variance)


def moments_of_sampler(steps, mean, deviation, update, added):
    """Mean and deviation of x_0 when x_T has the right marginal and each update is affine in x_t.

    Args:
      steps: the `Step`s, noisiest first.
      mean: of the target.
      deviation: of the target.
      update: (step, x_0, noise, x_t) -> x_before without the added noise.
      added: step -> deviation of the added noise.
    """
    center, variance = marginal(steps[0].alpha, steps[0].sigma, mean, deviation)
    x_t = np.array([0.0, 1.0])
    for step in steps:
        offset, at_1 = update(step, *optimal_prediction(step.alpha, step.sigma, mean, deviation, x_t), x_t)
        slope = at_1 - offset
        center, variance = offset + slope * center, slope**2 * variance + added(step) ** 2
    return center, math.sqrt(variance)
