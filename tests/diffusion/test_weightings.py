"""Weights of the loss are those of the papers for every target, and finite at both ends of time.

| quantity, float32 | float64 NumPy against | relative tolerance |
|---|---|---|
| weights | the papers' formulas for the target, written with the SNR | 1e-5 |
| the terms of the loss | weight times the unweighted MSE | 1e-6 |
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles_diffusion as oracle
import pytest

from diffussm_jax.diffusion import (
    GVP,
    P2,
    X0,
    Drawn,
    MinSNR,
    Noise,
    Objective,
    RectifiedFlow,
    V,
    Velocity,
    cosine_schedule,
    unweighted,
)

TARGETS = {"noise": Noise(), "x_0": X0(), "v": V(), "velocity": Velocity()}
STEPS = np.array([0, 1, 10, 300, 700, 998, 999], np.int32)
FRACTIONS = np.array([1e-3, 0.1, 0.3, 0.5, 0.9, 0.999], np.float32)
PROCESSES = {
    "cosine": (cosine_schedule(), STEPS, oracle.ddpm_step(oracle.cosine_betas(1000), STEPS, -1)),
    "flow": (RectifiedFlow(), FRACTIONS, oracle.flow_step(FRACTIONS.astype(np.float64), 0.0)),
    "gvp": (GVP(), FRACTIONS, oracle.gvp_step(FRACTIONS.astype(np.float64), 0.0)),
}
# Of the squared error of the noise, for SNR s.
WEIGHTINGS = {
    MinSNR(): lambda s: np.minimum(s, 5) / s,
    MinSNR(1.5): lambda s: np.minimum(s, 1.5) / s,
    P2(): lambda s: 1 / (1 + s),
    P2(0.5, 2.0): lambda s: 1 / (2 + s) ** 0.5,
    P2(0.0): lambda s: 1 + 0 * s,
}


def weights(process, target, weighting, t):
    objective = Objective(process, target, has_learned_variance=False, weighting=weighting)
    return np.asarray(jax.jit(objective.weight)(jnp.asarray(t)))


def squared_error_of_noise(name, process_name, step):
    """Of a unit error of the target, at a fixed x_t; the determinants are those of two linear equations."""
    alpha, sigma = step.alpha, step.sigma
    by_name = {
        "noise": 1 + 0 * alpha,
        "x_0": alpha**2 / sigma**2,
        "v": alpha**2 / (alpha**2 + sigma**2) ** 2,
        "velocity": (alpha / (alpha + sigma)) ** 2 if process_name != "gvp" else (alpha / (np.pi / 2)) ** 2,
    }
    return by_name[name]


@pytest.mark.parametrize("process_name", PROCESSES)
@pytest.mark.parametrize("name", TARGETS)
def test_weights_of_every_target_and_process(name, process_name):
    process, t, step = PROCESSES[process_name]
    if name == "noise" and process_name != "cosine":
        pytest.skip("the noise is no target where alpha reaches 0")
    for weighting, of_noise in WEIGHTINGS.items():
        expected = of_noise(step.alpha**2 / step.sigma**2) * squared_error_of_noise(name, process_name, step)
        np.testing.assert_allclose(weights(process, TARGETS[name], weighting, t), expected, rtol=1e-5)


def test_min_snr_as_its_paper_and_diffusers_write_it():
    process, t, step = PROCESSES["cosine"]
    s = step.alpha**2 / step.sigma**2
    for target, expected in (
        (Noise(), np.minimum(s, 5) / s),
        (X0(), np.minimum(s, 5)),
        (V(), np.minimum(s, 5) / (s + 1)),
    ):
        np.testing.assert_allclose(weights(process, target, MinSNR(5.0), t), expected, rtol=1e-5)


@pytest.mark.parametrize("process", [RectifiedFlow(), GVP()])
@pytest.mark.parametrize("name", ["x_0", "v", "velocity"])
def test_weights_at_the_ends_of_continuous_time_are_finite(name, process):
    for weighting in (MinSNR(), P2(), P2(2.0)):
        data, noise = weights(process, TARGETS[name], weighting, np.array([0, 1], np.float32))
        assert np.isfinite(data) and noise == 0  # no signal, no weight


def test_weights_without_signal_at_the_last_step_are_0():
    process = cosine_schedule(has_zero_terminal_snr=True)
    for weighting in (MinSNR(), P2()):
        before, last = weights(process, V(), weighting, np.array([998, 999], np.int32))
        assert before > 0 and last == 0


@pytest.mark.parametrize("has_learned_variance", [True, False])
def test_the_weight_is_of_the_mse_alone(has_learned_variance):
    """`mse` stays what it was, `vlb` too."""
    process, t, _ = PROCESSES["cosine"]
    x_0, noise, other = np.random.default_rng(0).normal(size=(3, 7, 4, 4, 2)).astype(np.float32)

    @jax.jit
    def run(x_0, noise, other):
        def model(x_t, t):
            return jnp.concatenate([other, x_t], -1) if has_learned_variance else other

        def losses(weighting):
            objective = Objective(process, V(), has_learned_variance, weighting)
            return objective.losses(model, Drawn(x_0, jnp.asarray(t), noise))

        return losses(unweighted()), losses(MinSNR())

    plain, weighted = run(x_0, noise, other)
    assert plain.keys() == weighted.keys()
    for name in plain.keys() - {"loss"}:
        np.testing.assert_allclose(weighted[name], plain[name], rtol=1e-6)
    vlb = plain.get("vlb", 0.0)
    np.testing.assert_allclose(plain["loss"], plain["mse"] + vlb, rtol=1e-6)
    expected = weights(process, V(), MinSNR(), t) * plain["mse"] + vlb
    np.testing.assert_allclose(weighted["loss"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MinSNR(0.0), "min_snr_gamma must be from 0.001 to 1000000.0, got 0.0"),
        (lambda: P2(p2_gamma=-1.0), "p2_gamma must be from 0 to 2, got -1.0"),
        (lambda: P2(p2_k=0.0), "p2_k must be from 0.001 to 1000.0, got 0.0"),
    ],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
