"""The losses of autoencoders against closed forms in float64; `test_parity_losses.py` has whole steps in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal
from random_tensors import assert_close

from diffussm_jax.autoencoder import losses

SHAPE = (3, 4, 6, 2)
X, X_HAT, DISTANCE = normal(0, *SHAPE), normal(1, *SHAPE), np.abs(normal(2, 3))
MEAN, LOG_STD = normal(3, *SHAPE), normal(4, *SHAPE)
REAL, FAKE = normal(5, 3, 2, 3, 1), normal(6, 3, 2, 3, 1)
TOLERANCE = 1e-6


def test_reconstruction():
    def reconstruct(x_hat, logvar):
        error = losses.reconstruction_error(X, x_hat, DISTANCE, 0.7)
        return losses.kl_nll(error, logvar), losses.vq_nll(error), error

    kl_nll, vq_nll, error = jax.jit(reconstruct)(X_HAT, 0.3)
    expected = np.abs(np.float64(X) - X_HAT) + 0.7 * np.float64(DISTANCE)[:, None, None, None]
    assert_close(error, expected, TOLERANCE)
    assert_close(kl_nll, (expected / np.exp(0.3) + 0.3).sum() / 3, TOLERANCE)
    assert_close(vq_nll, expected.mean(), TOLERANCE)
    assert_close(losses.kl_nll(error), expected.sum() / 3, TOLERANCE)
    assert_close(losses.reconstruction_error(X, X_HAT), np.abs(np.float64(X) - X_HAT), TOLERANCE)

    (of_kl, of_logvar), (of_vq, _) = jax.jit(jax.jacrev(lambda *a: reconstruct(*a)[:2], (0, 1)))(X_HAT, 0.3)
    sign = np.sign(np.float64(X_HAT) - X)
    assert_close(of_kl, sign / np.exp(0.3) / 3, TOLERANCE)
    assert_close(of_vq, sign / sign.size, TOLERANCE)
    assert_close(of_logvar, (1 - expected / np.exp(0.3)).sum() / 3, 1e-5)  # terms of both signs


def test_kl_divergence():
    kl, (of_mean, of_log_std) = jax.jit(jax.value_and_grad(losses.kl_divergence, (0, 1)))(MEAN, LOG_STD)
    mean, log_std = np.float64(MEAN), np.float64(LOG_STD)
    # The integral of q log(q / p), by Gauss-Hermite quadrature, which is exact here.
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    z = mean[..., None] + np.exp(log_std)[..., None] * nodes
    log_ratio = -log_std[..., None] - nodes**2 / 2 + z**2 / 2
    assert_close(kl, (log_ratio @ weights).sum() / np.sqrt(2 * np.pi) / 3, TOLERANCE)
    assert_close(of_mean, mean / 3, TOLERANCE)
    assert_close(of_log_std, (np.exp(2 * log_std) - 1) / 3, TOLERANCE)


def test_adversarial():
    real, fake = np.float64(REAL), np.float64(FAKE)
    expected = {
        "hinge": 0.5 * np.maximum(0, 1 - real).mean() + 0.5 * np.maximum(0, 1 + fake).mean(),
        "vanilla": 0.5 * np.log1p(np.exp(-real)).mean() + 0.5 * np.log1p(np.exp(fake)).mean(),
    }
    assert expected.keys() == losses.DISCRIMINATOR_LOSSES.keys()
    for kind, value in expected.items():
        assert_close(losses.discriminator_loss(REAL, FAKE, kind), value, TOLERANCE)
    assert losses.discriminator_loss(REAL, FAKE) == losses.discriminator_loss(REAL, FAKE, "hinge")
    assert_close(losses.generator_loss(FAKE), -fake.mean(), TOLERANCE)
    large = losses.discriminator_loss(jnp.full(4, -1e4), jnp.full(4, 1e4), "vanilla")
    assert_close(large, 1e4, TOLERANCE)  # no overflow
    with pytest.raises(ValueError, match=r"'wgan'.*hinge, vanilla"):
        losses.discriminator_loss(REAL, FAKE, "wgan")


def test_adaptive_factor():
    a, b = normal(7, 3, 3, 4, 3), normal(8, 3, 3, 4, 3)
    size = np.linalg.norm(np.float64(a))
    assert_close(losses.adaptive_factor(a, b), size / (np.linalg.norm(np.float64(b)) + 1e-4), TOLERANCE)
    assert_close(losses.adaptive_factor(a * 1e-3, np.zeros_like(b)), size * 10, TOLERANCE)
    assert losses.adaptive_factor(a, np.zeros_like(b)) == 1e4 == losses.MAX_FACTOR
    assert losses.adaptive_factor(np.zeros_like(a), b) == 0
    for gradient in jax.grad(losses.adaptive_factor, (0, 1))(a, np.zeros_like(b)):
        np.testing.assert_array_equal(gradient, 0)


def test_r1_penalty():
    # D(x) = mean over positions of (w . x)^2 / 2 + v . x has the gradient ((w . x) w + v) / (h w).
    w, v = normal(9, 2), normal(10, 2)

    def logits_of(x, w):
        return (jnp.square(x @ w) / 2 + x @ v)[..., None]

    penalty = jax.jit(jax.value_and_grad(lambda w: losses.r1_penalty(lambda x: logits_of(x, w), X)))
    value, of_w = penalty(w)

    def expected(w):
        gradient = ((np.float64(X) @ w)[..., None] * w + v) / 24
        return 0.5 * (gradient**2).sum((1, 2, 3)).mean()

    step = 1e-5 * np.eye(2)
    assert_close(value, expected(np.float64(w)), TOLERANCE)
    assert_close(of_w, [(expected(w + s) - expected(w - s)) / 2e-5 for s in step], 1e-5)


@pytest.mark.parametrize(
    ("start", "warmup", "ramp", "trained_from", "weights"),
    [
        (5, 0, 0, 5, {4: 0, 5: 1, 6: 1}),  # LDM's
        (5, 0, 1, 5, {4: 0, 5: 1}),
        (0, 0, 0, 0, {0: 1}),
        (5, 3, 4, 2, {0: 0, 4: 0, 5: 0.25, 6: 0.5, 7: 0.75, 8: 1, 9: 1}),
        (50_001, 100, 1000, 49_901, {50_000: 0, 50_001: 0.001, 51_000: 1, 2**30: 1}),
    ],
)
def test_schedule(start, warmup, ramp, trained_from, weights):
    for step in (jnp.int32, jnp.uint32):
        schedule = jax.jit(lambda s: losses.schedule(s, start, warmup, ramp))
        for at, weight in weights.items():
            is_trained, found = schedule(step(at))
            assert is_trained.dtype == found.dtype == jnp.float32
            np.testing.assert_allclose(found, weight, rtol=1e-6)
        for at in range(max(trained_from - 2, 0), trained_from + 2):
            assert schedule(step(at))[0] == (at >= trained_from)
    assert losses.schedule(start, start, warmup, ramp)[0] == 1


def test_all_is_float32_for_bfloat16_inputs():
    x, x_hat, distance, mean, log_std, real, fake = (
        jnp.asarray(a, jnp.bfloat16) for a in (X, X_HAT, DISTANCE, MEAN, LOG_STD, REAL, FAKE)
    )

    def all_losses(cast):
        error = losses.reconstruction_error(cast(x), cast(x_hat), cast(distance), 0.7)
        return [
            error,
            losses.kl_nll(cast(error.astype(jnp.bfloat16)), jnp.bfloat16(0.5)),
            losses.vq_nll(cast(error.astype(jnp.bfloat16))),
            losses.kl_divergence(cast(mean), cast(log_std)),
            losses.generator_loss(cast(fake)),
            *(losses.discriminator_loss(cast(real), cast(fake), kind) for kind in losses.DISCRIMINATOR_LOSSES),
            losses.adaptive_factor(cast(x), cast(x_hat)),
            losses.r1_penalty(lambda x: cast(jnp.square(x).sum(-1, keepdims=True).astype(jnp.bfloat16)), X),
        ]

    for low, high in zip(all_losses(lambda a: a), all_losses(lambda a: a.astype(jnp.float32)), strict=True):
        assert low.dtype == jnp.float32
        assert_close(low, high, TOLERANCE)
