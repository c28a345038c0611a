"""What the diffusion process should compute, in NumPy float64, written from the papers and not from the package.

DDPM is arXiv 2006.11239, Improved DDPM arXiv 2102.09672, DDIM arXiv 2010.02502. Where the papers leave a choice, it is
that of ADM (arXiv 2105.05233) and DiT (arXiv 2212.09748): the posterior variance at t = 0 is replaced by that at t = 1,
the normal distribution function is the tanh approximation, the VLB term is in bits per dimension and weighs 1.

A process is its vector of betas. Functions take one image of any shape and one time, an index into the betas; `by_row`
maps them over a batch. The posterior comes from Bayes' rule and not from the papers' coefficients, so as to check them.
"""

import itertools
import math

import numpy as np


def float64(*arrays):
    """The arrays in float64: float32 ones would stay so beside Python's numbers."""
    return tuple(np.asarray(array, np.float64) for array in arrays)


def by_row(function, *batches):
    """function's values for each row of the batches, stacked (a tuple of stacks if it returns a tuple)."""
    rows = [function(*row) for row in zip(*batches, strict=True)]
    return tuple(map(np.stack, zip(*rows, strict=True))) if isinstance(rows[0], tuple) else np.stack(rows)


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


def alpha_bar(betas, t):
    """The product of 1 - beta up to and with t; 1 for t = -1."""
    return math.exp(math.fsum(math.log1p(-beta) for beta in betas[: t + 1]))


def adm_timesteps(num_steps, num_kept):
    """ADM's space_timesteps for a single section of at least two steps, without its accumulated rounding."""
    return [round(i * (num_steps - 1) / (num_kept - 1)) for i in range(num_kept)]


def respaced_betas(betas, kept):
    """Improved DDPM, section 4: beta = 1 - alpha_bar / (alpha_bar of the step kept before)."""
    values = [1.0] + [alpha_bar(betas, t) for t in kept]
    return np.array([1 - after / before for before, after in itertools.pairwise(values)])


# The forward process and the reverse step


def q_sample(betas, x_0, t, noise):
    """DDPM, equation 4."""
    x_0, noise = float64(x_0, noise)
    return math.sqrt(alpha_bar(betas, t)) * x_0 + math.sqrt(1 - alpha_bar(betas, t)) * noise


def q_posterior(betas, x_0, x_t, t):
    """Mean and variance of q(x_{t-1} | x_t, x_0): the prior q(x_{t-1} | x_0) times the likelihood q(x_t | x_{t-1})."""
    x_0, x_t = float64(x_0, x_t)
    if t == 0:
        return x_0, 0.0
    prior_mean, prior_variance = math.sqrt(alpha_bar(betas, t - 1)) * x_0, 1 - alpha_bar(betas, t - 1)
    slope = math.sqrt(1 - betas[t])
    precision = 1 / prior_variance + slope**2 / betas[t]
    return (prior_mean / prior_variance + slope * x_t / betas[t]) / precision, 1 / precision


def variance_bounds(betas, t):
    """The two ends of the learned range (Improved DDPM, section 3.1)."""
    if len(betas) == 1:
        return betas[0], betas[0]
    _, lower = q_posterior(betas, 0.0, 0.0, max(t, 1))
    return lower, betas[t]


def p_mean_variance(betas, output, x_t, t, clip_x_0=False):
    """Mean and log variance of p(x_{t-1} | x_t), predicted x_0 and noise, of a model's output [..., 2C]."""
    output, x_t = float64(output, x_t)
    noise, raw = np.split(output, 2, -1)
    signal_scale, noise_scale = math.sqrt(alpha_bar(betas, t)), math.sqrt(1 - alpha_bar(betas, t))
    x_0 = (x_t - noise_scale * noise) / signal_scale
    if clip_x_0:
        x_0 = np.minimum(np.maximum(x_0, -1), 1)
    mean, _ = q_posterior(betas, x_0, x_t, t)
    lower, upper = variance_bounds(betas, t)
    v = (raw + 1) / 2
    return mean, v * math.log(upper) + (1 - v) * math.log(lower), x_0, (x_t - signal_scale * x_0) / noise_scale


# The loss


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


def vlb_term(betas, output, x_0, x_t, t):
    """The term of the variational bound at t (DDPM, equation 5), in bits per dimension."""
    mean, log_variance, _, _ = p_mean_variance(betas, output, x_t, t)
    if t == 0:
        nats = -discretized_log_likelihood(x_0, mean, log_variance)
    else:
        nats = normal_kl(*q_posterior(betas, x_0, x_t, t), mean, np.exp(log_variance))
    return np.mean(nats) / math.log(2)


def mse_term(output, noise):
    """DDPM, equation 14."""
    output, noise = float64(output, noise)
    return np.mean((np.split(output, 2, -1)[0] - noise) ** 2)


# Samplers


def ddpm_update(betas, output, x_t, t, noise, clip_x_0=False):
    """x_{t-1} of DDPM, algorithm 2, with the learned variance."""
    mean, log_variance, _, _ = p_mean_variance(betas, output, x_t, t, clip_x_0)
    return mean + np.exp(log_variance / 2) * noise if t > 0 else mean


def ddim_sigma(betas, t, eta):
    """DDIM, equation 16."""
    now, before = alpha_bar(betas, t), alpha_bar(betas, t - 1)
    return eta * math.sqrt((1 - before) / (1 - now)) * math.sqrt(1 - now / before)


def ddim_update(betas, output, x_t, t, noise, eta=0.0, clip_x_0=False):
    """x_{t-1} of DDIM, equation 12."""
    _, _, x_0, predicted_noise = p_mean_variance(betas, output, x_t, t, clip_x_0)
    sigma, before = ddim_sigma(betas, t, eta), alpha_bar(betas, t - 1)
    return math.sqrt(before) * x_0 + math.sqrt(max(1 - before - sigma**2, 0)) * predicted_noise + sigma * noise


# A target N(mean, deviation^2), whose reverse process is known


def marginal(betas, mean, deviation, t):
    """Mean and variance of q(x_t)."""
    signal = alpha_bar(betas, t)
    return math.sqrt(signal) * mean, signal * deviation**2 + 1 - signal


def optimal_reverse_variance(betas, mean, deviation, t):
    """The variance of q(x_{t-1} | x_t), with x_0 integrated out; t > 0."""
    _, before = marginal(betas, mean, deviation, t - 1)
    return 1 / (1 / before + (1 - betas[t]) / betas[t])


def probability_flow(betas, mean, deviation, x_T):
    """x_0 of the probability-flow ODE from x_T: its flow keeps each point's standard score."""
    mean_T, variance_T = marginal(betas, mean, deviation, len(betas) - 1)
    return mean + deviation * (x_T - mean_T) / math.sqrt(variance_T)
