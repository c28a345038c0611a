"""Predictions, the learned reverse step and the loss agree with a float64 oracle, gradients included.

| quantity, float32 | against | tolerance, relative to the row's largest value |
|---|---|---|
| prediction, mean and log variance of the reverse step | float64 NumPy | 1e-5 |
| the terms of the loss | float64 NumPy | 1e-5 |
| the terms of the loss | the code before targets and processes | MSE 1e-6; VLB 2e-5, which XLA's fusions change |
| MSE's gradient in the model's output | closed form | 1e-5 |
| VLB's gradient in the model's output | central differences in float64 | 1e-4, or 1e-9 absolute |
| normal_kl | numerical integration | 1e-5 |
| the discretised likelihood | float64 NumPy; with the exact normal distribution function | 1e-5; 4e-4 in mass |
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles_diffusion as oracle
import pytest

from diffussm_jax.diffusion import (
    X0,
    DiscreteProcess,
    Drawn,
    Noise,
    Objective,
    RectifiedFlow,
    Reverse,
    V,
    Velocity,
    clipped,
    cosine_schedule,
    linear_schedule,
)
from diffussm_jax.diffusion.objective import discretized_gaussian_log_likelihood, normal_kl, p_mean_variance

RTOL = 1e-5
OLD_MSE_RTOL = 1e-6
OLD_VLB_RTOL = 2e-5
VLB_GRADIENT_RTOL = 1e-4
VLB_GRADIENT_ATOL = 1e-9
CDF_ATOL = 4e-4

PROCESSES = {
    "linear": linear_schedule(1000),
    "cosine": cosine_schedule(1000),
    "respaced": DiscreteProcess(oracle.respaced_betas(oracle.linear_betas(1000), oracle.adm_timesteps(1000, 250))),
}
TARGETS = {"noise": Noise(), "x_0": X0(), "v": V(), "velocity": Velocity()}
CASES = [("linear", name) for name in TARGETS] + [("cosine", "noise"), ("respaced", "noise")]
SHAPE = (3, 4, 4)
FLOW = RectifiedFlow()
FLOW_TIMES = np.array([0.001, 0.25, 0.5, 0.75, 0.999, 1.0], np.float32)

# For programs whose accuracy is of no interest, or has been measured in others.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
all_cases = pytest.mark.parametrize("process_name, target_name", CASES)


def largest_of_row(values):
    return np.abs(values).reshape(len(values), -1).max(1)


def assert_rows_close(actual, expected, rtol=RTOL, atol=0.0, scale=None):
    """Each row agrees to atol + rtol of its scale, by default its largest value, so that no row hides another."""
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    error = largest_of_row(np.asarray(actual, np.float64) - expected)
    allowed = atol + rtol * (largest_of_row(expected) if scale is None else scale)
    assert (error <= allowed).all(), f"errors of rows {error}, allowed {allowed}"


class Case:
    """Inputs, float64 oracle and the package's results for one process and target, the variance learned."""

    def __init__(self, process_name, target_name):
        self.process, self.target = PROCESSES[process_name], target_name
        last = self.process.num_steps - 1
        self.t = np.array([0, 1, 2, last // 2, last - 1, last], np.int32)
        self.step = oracle.ddpm_step(self.process.betas, self.t, self.t - 1)
        self.bounds = oracle.variance_bounds(self.process.betas, self.t)
        random = np.random.default_rng(0)
        # x_0 has values within and beyond [-1, 1] and on its ends. The noise is predicted half right, and x_0 in
        # agreement with it, so that the variational bound is the same for every target.
        x_0, noise, error, raw = random.normal(size=(4, 6, *SHAPE)).astype(np.float32)
        x_0[:, 0, 0, 0], x_0[:, 0, 0, 1] = -1, 1
        self.x_0, self.noise, self.other = x_0, noise, error
        self.x_t = oracle.q_sample(self.step, x_0, noise)
        self.value = oracle.target(target_name, self.step, x_0, noise)
        predicted = oracle.x_0_and_noise("noise", self.step, noise + 0.5 * error, self.x_t)
        output = np.concatenate([oracle.target(target_name, self.step, *predicted), raw], -1)
        self.output = output.astype(np.float32)

        objective = Objective(self.process, TARGETS[target_name])
        reverse = Reverse(*(v[::-1][self.t] for v in self.process.reverse(self.process.times(last + 1))))

        def run(drawn, output, x_t):
            def losses(output):
                calls = []
                return objective.losses(lambda *call: calls.append(call) or output, drawn), calls

            values, pull_back, calls = jax.vjp(losses, output, has_aux=True)
            one_of_each = jnp.repeat(jnp.eye(len(values))[:, :, None], len(x_t), -1)
            (stacked,) = jax.vmap(pull_back)(dict(zip(values, one_of_each, strict=True)))
            gradients = dict(zip(values, stacked, strict=True))
            steps = []
            denoise = objective.predict(lambda x_t, time: output)
            for clip_or_not in denoise, clipped(denoise, self.process):
                prediction = clip_or_not(x_t, drawn.t)
                column = Reverse(*(jnp.asarray(v, jnp.float32)[:, None, None, None] for v in reverse))
                steps.append((*p_mean_variance(column, prediction, x_t), prediction.x_0, prediction.noise))
            return values, gradients, steps, calls

        jit = jax.jit if target_name == "noise" else quick_jit
        with jax.numpy_dtype_promotion("strict"):
            results = jit(run)(Drawn(x_0, jnp.asarray(self.t), noise), self.output, error)
        self.losses, self.gradients, self.steps, self.calls = jax.device_get(results)

    def gradient(self, name):
        """Of the sum over the batch, in the predicted target and in the raw variance."""
        return np.split(self.gradients[name], 2, -1)


case_of = functools.cache(Case)


# Predictions and the reverse step


@pytest.mark.parametrize("clip_x_0", [False, True])
@all_cases
def test_reverse_step(process_name, target_name, clip_x_0):
    """Mean, log variance, x_0 and noise, at an x_t that has nothing to do with the output."""
    case = case_of(process_name, target_name)
    make = functools.partial(oracle.p_mean_variance, case.step, case.bounds, case.output, case.other)
    unclipped_x_0 = make(target=case.target)[2]
    for i, expected in enumerate(make(target=case.target, clip_x_0=clip_x_0)):
        # Clipping does not undo the rounding of an x_0 that was 100 times larger before.
        scale = largest_of_row(unclipped_x_0) if i == 2 else None
        assert_rows_close(case.steps[clip_x_0][i], expected, scale=scale)


def test_learned_range_is_not_clipped():
    """-1 and 1 give the bounds of the variance, and what lies beyond goes on in a line."""
    raw = np.array([-1.0, 1.0, 3.0, -2.0], np.float32)
    for process in PROCESSES.values():
        times = process.times(process.num_steps)
        lower, upper = map(np.log, oracle.variance_bounds(process.betas, times[:-1]))

        @quick_jit
        def log_variance(raw, process=process, times=times):
            objective, x_t = Objective(process, V()), jnp.zeros((4, 1))
            output = jnp.stack([jnp.zeros(4), raw], -1)
            prediction = objective.predict(lambda x_t, time: output)(x_t, jnp.zeros(4, jnp.int32))
            reverse = Reverse(*(jnp.asarray(v, jnp.float32) for v in process.reverse(times)))
            return p_mean_variance(reverse, prediction, x_t)[1]

        actual = np.asarray(log_variance(raw), np.float64)
        rows = np.array([0, 1, len(lower) // 2, -3, -2, -1])
        for row, fraction in zip(actual[:, rows], (0, 1, 2, -0.5), strict=True):
            expected = fraction * upper[rows] + (1 - fraction) * lower[rows]
            np.testing.assert_allclose(row, expected, rtol=RTOL)


def test_without_a_learned_variance_it_is_the_posteriors():
    process = PROCESSES["linear"]
    prediction = Objective(process, Noise(), has_learned_variance=False).predict(lambda x_t, t: x_t)
    prediction = prediction(jnp.ones((2, 3)), jnp.asarray([5, 5]))
    assert prediction.variance_fraction is None
    reverse = Reverse(*(jnp.float32(values[0]) for values in process.reverse(np.array([5, 4, -1]))))
    _, log_variance = p_mean_variance(reverse, prediction, jnp.ones((2, 3)))
    expected = np.log(oracle.posterior_variance(oracle.ddpm_step(process.betas, 5, 4)))
    assert float(log_variance) == pytest.approx(expected, rel=RTOL)


def test_a_bfloat16_output_is_read_as_float32():
    case = case_of("linear", "noise")
    objective = Objective(case.process, Noise())

    @quick_jit
    def run(drawn, output):
        def read(output):
            prediction = objective.predict(lambda x_t, time: output)(drawn.x_0, drawn.t)
            return prediction, objective.losses(lambda x_t, time: output, drawn)

        output = output.astype(jnp.bfloat16)
        return read(output), read(output.astype(jnp.float32))

    results = run(Drawn(case.x_0, case.t, case.noise), case.output)
    for actual, expected in zip(*map(jax.tree.leaves, results), strict=True):
        assert actual.dtype == jnp.float32
        np.testing.assert_array_equal(actual, expected)


def test_the_condition_is_passed_on():
    objective = Objective(FLOW, Velocity(), has_learned_variance=False)
    x_t, t = jnp.ones((2, 3)), jnp.asarray([0.25, 0.5])

    def apply(*arguments):
        calls.append(arguments)
        return x_t

    calls = []
    objective.predict(apply)(x_t, t, "condition")
    objective.predict(apply)(x_t, t)
    assert [len(arguments) for arguments in calls] == [3, 2]
    assert calls[0][0] is x_t and calls[0][2] == "condition"
    np.testing.assert_array_equal(calls[0][1], [250, 500])


# The loss


@all_cases
def test_losses(process_name, target_name):
    case = case_of(process_name, target_name)
    mse = oracle.mse_term(np.split(case.output, 2, -1)[0], case.value)
    vlb = oracle.vlb_elements(case.process.betas, case.output, case.x_0, case.x_t, case.t, target=case.target)
    expected = {"mse": mse, "vlb": oracle.mean_of_rows(vlb), "loss": mse + oracle.mean_of_rows(vlb)}
    assert case.losses.keys() == expected.keys()
    for name in expected:
        assert_rows_close(case.losses[name], expected[name])


@pytest.mark.parametrize("name", ["x_0", "v", "velocity"])
def test_losses_of_rectified_flow_are_the_mse(name):
    """And the model is given 1000 t."""
    x_0, noise, error = np.random.default_rng(1).normal(size=(3, 6, *SHAPE)).astype(np.float32)
    step = oracle.flow_step(FLOW_TIMES.astype(np.float64), 0.0)
    value = oracle.target(name, step, x_0, noise)

    @quick_jit
    def run(drawn, output):
        calls = []
        objective = Objective(FLOW, TARGETS[name], has_learned_variance=False)
        return objective.losses(lambda *call: calls.append(call) or output, drawn), calls

    losses, ((x_t, time),) = run(Drawn(x_0, FLOW_TIMES, noise), (value + error).astype(np.float32))
    assert losses.keys() == {"loss", "mse"}
    for loss in losses.values():
        assert_rows_close(loss, oracle.mse_term(value + error, value))
    assert_rows_close(x_t, oracle.q_sample(step, x_0, noise))
    np.testing.assert_allclose(time, 1000 * FLOW_TIMES, rtol=1e-6)


@all_cases
def test_losses_evaluate_the_model_once_at_x_t_and_its_time(process_name, target_name):
    case = case_of(process_name, target_name)
    ((x_t, time),) = case.calls
    assert_rows_close(x_t, case.x_t)
    np.testing.assert_array_equal(time, case.t)


# Of training_losses at c3000c3, before there were processes and targets, for `old_model`.
OLD_LOSSES = {
    "linear": {
        "loss": [3.1998136, 0.55827457, 0.058913089, 0.00037578138],
        "mse": [0.88620639, 0.33494353, 0.058448136, 0.00037085122],
        "vlb": [2.3136072, 0.22333103, 0.00046495508, 4.9301693e-06],
    },
    "cosine": {
        "loss": [2.559454, 0.54858494, 0.43519726, 0.011144459],
        "mse": [0.8879258, 0.33677441, 0.43324566, 0.01098099],
        "vlb": [1.6715282, 0.21181051, 0.0019516018, 0.00016346951],
    },
}


def old_model(x_t, t):
    rest = 1 - t.astype(jnp.float32)[:, None] / 999
    noise = (1 - 0.8 * rest**2) * x_t + 0.2 * rest * jnp.sin(2 * x_t)
    return jnp.concatenate([noise, jnp.cos(3 * x_t - rest)], -1)


def test_losses_are_those_of_the_code_before():
    x_0 = np.sin(np.arange(12.0)).reshape(4, 3).astype(np.float32)
    noise = np.cos(2 * np.arange(12.0)).reshape(4, 3).astype(np.float32)
    drawn = Drawn(x_0, np.array([0, 1, 500, 900], np.int32), noise)
    run = jax.jit(
        lambda drawn: {name: Objective(PROCESSES[name], Noise()).losses(old_model, drawn) for name in OLD_LOSSES}
    )
    for process_name, losses in run(drawn).items():
        for name, loss in losses.items():
            old = np.array(OLD_LOSSES[process_name][name])
            atol = OLD_MSE_RTOL * old.max() if name == "mse" else OLD_VLB_RTOL * old
            np.testing.assert_array_less(np.abs(loss - old), atol, err_msg=name)


@all_cases
def test_mse_gradient_reaches_the_target_alone(process_name, target_name):
    case = case_of(process_name, target_name)
    in_target, in_variance = case.gradient("mse")
    predicted, _ = np.split(case.output.astype(np.float64), 2, -1)
    assert_rows_close(in_target, 2 * (predicted - case.value) / np.prod(SHAPE))
    np.testing.assert_array_equal(in_variance, 0)


@all_cases
def test_vlb_gradient_reaches_the_variance_alone(process_name, target_name):
    """An element's bound depends on its own variance, so that one difference gives all of the gradient."""
    case = case_of(process_name, target_name)
    in_target, in_variance = case.gradient("vlb")
    np.testing.assert_array_equal(in_target, 0)

    predicted, raw = np.split(case.output.astype(np.float64), 2, -1)
    step = 1e-4
    above, below = (
        oracle.vlb_elements(
            case.process.betas,
            np.concatenate([predicted, raw + offset], -1),
            case.x_0,
            case.x_t,
            case.t,
            target=case.target,
        )
        for offset in (step, -step)
    )
    expected = (above - below) / (2 * step) / np.prod(SHAPE)
    # Where the two bounds all but meet, the gradient is what the rounding of their float32 logarithms leaves.
    assert_rows_close(in_variance, expected, VLB_GRADIENT_RTOL, VLB_GRADIENT_ATOL)


@all_cases
def test_loss_gradient_is_the_sum_of_both(process_name, target_name):
    case = case_of(process_name, target_name)
    in_target, in_variance = case.gradient("loss")
    np.testing.assert_array_equal(in_target, case.gradient("mse")[0])
    np.testing.assert_array_equal(in_variance, case.gradient("vlb")[1])


# Draws


@pytest.mark.parametrize("process", [PROCESSES["linear"], FLOW], ids=["discrete", "flow"])
def test_draws_times_and_noise_for_the_whole_batch(process):
    """Times by the first key alone, noise by the second."""
    x_0 = np.zeros((64, 4, 4, 3), np.float32)
    objective = Objective(process, V(), has_learned_variance=False)

    def draw(t_seed, noise_seed):
        return objective.draw(jax.random.key(t_seed), jax.random.key(noise_seed), jnp.asarray(x_0))

    drawn = jax.device_get(quick_jit(jax.vmap(draw))(np.array([0, 0, 2]), np.array([1, 2, 1])))
    np.testing.assert_array_equal(drawn.x_0, np.stack([x_0] * 3))
    assert drawn.t.shape == (3, 64)
    np.testing.assert_array_equal(drawn.t[0], drawn.t[1])
    assert (drawn.t[0] != drawn.t[2]).mean() > 0.9
    assert drawn.noise.shape == (3, *x_0.shape) and drawn.noise.dtype == np.float32
    np.testing.assert_array_equal(drawn.noise[0], drawn.noise[2])
    assert (drawn.noise[0] != drawn.noise[1]).mean() > 0.99
    assert abs(drawn.noise[0].mean()) < 5 / np.sqrt(x_0.size)
    assert abs(drawn.noise[0].std() - 1) < 5 / np.sqrt(2 * x_0.size)


# KL and likelihood


def test_normal_kl_is_the_integral():
    rows = np.array([(0.0, 0.0, 1.0, 0.0), (0.3, -1.0, 0.3, 1.0), (-2.0, 0.5, 0.5, -0.7), (0.1, -9.0, 0.12, -8.5)])
    actual = jax.jit(normal_kl)(*rows.T.astype(np.float32))
    z = np.linspace(-12, 12, 20001)
    for value, (mean_q, log_variance_q, mean_p, log_variance_p) in zip(np.asarray(actual), rows, strict=True):
        x = mean_q + np.exp(log_variance_q / 2) * z
        log_q = -(z**2) / 2 - log_variance_q / 2
        log_p = -((x - mean_p) ** 2) / (2 * np.exp(log_variance_p)) - log_variance_p / 2
        integral = np.trapezoid(np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * (log_q - log_p), z)
        assert float(value) == pytest.approx(integral, rel=RTOL)


def test_normal_kl_of_a_distribution_with_itself_is_zero():
    assert float(normal_kl(*map(jnp.float32, (0.7, -3.0, 0.7, -3.0)))) == 0


def test_discretized_likelihood():
    x = np.linspace(-1, 1, 256).astype(np.float32)
    rows = np.array([(0.0, -2.0), (0.9, -5.0), (-1.2, -4.0), (0.501, -9.2)])
    mean, log_variance = rows.T[:, :, None]
    arguments = x[None], mean.astype(np.float32), log_variance.astype(np.float32)
    mass = np.exp(np.asarray(jax.jit(discretized_gaussian_log_likelihood)(*arguments), np.float64))
    np.testing.assert_allclose(mass.sum(1), 1, rtol=0, atol=RTOL)
    expected = np.exp(oracle.discretized_log_likelihood(x, mean, log_variance))
    np.testing.assert_allclose(mass, expected, rtol=0, atol=RTOL)
    exact = np.exp(oracle.discretized_log_likelihood(x, mean, log_variance, oracle.exact_normal_cdf))
    np.testing.assert_allclose(mass, exact, rtol=0, atol=CDF_ATOL)


def test_discretized_likelihood_far_from_the_data_is_floored_and_has_a_finite_gradient():
    x = jnp.asarray([-1.0, -0.2, 0.5, 1.0])
    mean = jnp.asarray([40.0, 30.0, -30.0, -40.0])

    @jax.jit
    def value_and_gradient(log_variance):
        value, pull_back = jax.vjp(lambda v: discretized_gaussian_log_likelihood(x, mean, v), log_variance)
        return value, pull_back(jnp.ones_like(value))[0]

    value, gradient = value_and_gradient(jnp.full(4, -9.0))
    np.testing.assert_allclose(value, np.log(1e-12), rtol=1e-6)
    assert np.isfinite(gradient).all()


# Errors


@pytest.mark.parametrize("has_learned_variance, expected", [(True, 8), (False, 4)])
def test_an_output_of_another_width_is_refused(has_learned_variance, expected):
    objective = Objective(PROCESSES["linear"], Noise(), has_learned_variance)
    assert objective.num_output_channels(4) == expected
    t, x = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((2, 4, 4, 4), jnp.float32)
    for num_channels in {4, 7, 8, 12} - {expected}:

        def apply(x_t, t, num_channels=num_channels):
            return jnp.zeros((2, 4, 4, num_channels))

        message = f"{expected} channels for 4 of input.*, got {num_channels}\\b"
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(objective.predict(apply), x, t)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda drawn, apply=apply: objective.losses(apply, drawn), Drawn(x, t, x))


def test_a_learned_variance_needs_discrete_time():
    with pytest.raises(ValueError, match="discrete time, got RectifiedFlow"):
        Objective(FLOW, V())


@pytest.mark.parametrize("process", [FLOW, DiscreteProcess(np.array([0.1, 0.5, 1.0]))], ids=["flow", "discrete"])
def test_noise_is_no_target_where_alpha_reaches_0(process):
    for name, target in TARGETS.items():
        if name == "noise":
            with pytest.raises(ValueError, match=f"target Noise .* {type(process).__name__}"):
                Objective(process, target, has_learned_variance=False)
        else:
            assert Objective(process, target, has_learned_variance=False).num_output_channels(3) == 3
