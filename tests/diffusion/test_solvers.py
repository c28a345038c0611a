"""DPM-Solver++, UniPC and Euler make the updates of the papers and converge at the order of the method.

The target is N(MEAN, DEVIATION^2) in every pixel, as in `test_samplers`.

| quantity, float32 | against | tolerance |
|---|---|---|
| each evaluated point, and x_0 | the papers' formulas in float64 NumPy | 1e-5 of the largest, or of 1 |
| the same | diffusers' schedulers, float64 | 1e-5 of the largest |
| deterministic samplers | the probability flow | error falls with a slope within 0.15 of the order |
| SDE-2M, Euler with churn | moments by the recursion of the updates | 5 standard errors |
| SDE-2M, Euler with churn | moments of the target | 5 standard errors and 0.02, the bias of 100 steps |
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles_diffusion as oracle
import oracles_solvers as solvers
import pytest

from diffussm_jax.diffusion import (
    DDIM,
    DDPM,
    GVP,
    TIME_GRIDS,
    X0,
    DPMSolverPP,
    Euler,
    Heun,
    Noise,
    Objective,
    Prediction,
    RectifiedFlow,
    UniPC,
    cosine_schedule,
    linear_schedule,
    num_evaluations,
    sample,
)

UPDATE_RTOL = 1e-5
ORDER_TOLERANCE = 0.15
STANDARD_ERRORS = 5
BIAS = 0.02

MEAN, DEVIATION = 0.4, 0.6
SHAPE = (2, 4, 4, 1)
FULL = linear_schedule(1000)
PROCESSES = {
    "linear": FULL,
    "zero terminal SNR": linear_schedule(1000, True),
    "flow": RectifiedFlow(),
    "gvp": GVP(),
    "linear, T = 100,000": linear_schedule(100_000),
    "cosine": cosine_schedule(1000),
}
UNIPC = {f"unipc-{order}-{variant}": UniPC(order, variant) for order in (1, 2, 3) for variant in ("bh1", "bh2")}
SOLVERS = {name: DPMSolverPP(name) for name in ("2m", "2s", "sde_2m")} | UNIPC
SOLVERS |= {"euler": Euler(), "euler-churn": Euler(0.7)}
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(seed, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def column(values, x):
    return jnp.asarray(values, jnp.float32).reshape(values.shape + (1,) * (x.ndim - 1))


def smooth_model(x_t, t):
    """Some x_0 that depends on x_t and t."""
    return jnp.sin(2 * x_t + column(t, x_t) / 200)


def target_denoise(process):
    """E[x_0 | x_t] and E[noise | x_t] for the target."""

    def denoise(x_t, t):
        alpha, sigma = (column(values(t), x_t) for values in (process.alpha, process.sigma))
        return Prediction(*oracle.optimal_prediction(alpha, sigma, MEAN, DEVIATION, x_t))

    return denoise


# Single updates


ORACLES = {"2m": solvers.dpm_2m, "2s": solvers.dpm_2s, "sde_2m": solvers.dpm_sde_2m, "euler": solvers.euler}
ORACLES |= {name: functools.partial(solvers.unipc, order=s.order, variant=s.variant) for name, s in UNIPC.items()}
ORACLES["euler-churn"] = functools.partial(solvers.euler, churn=0.7)


def noises_by_steps_left(num_steps):
    draw = quick_jit(jax.vmap(lambda left: jax.random.normal(jax.random.fold_in(jax.random.key(7), left), SHAPE)))
    return np.asarray(draw(np.arange(num_steps, dtype=np.int32)), np.float64)[::-1]


GRIDS = {
    "linear": [999, 700, 500, 200, 90, 89, 30, -1],  # uneven, and without a step between two of them
    "zero terminal SNR": [999, 850, 600, 250, 60, 8, -1],
    "flow": [1.0, 0.8, 0.7, 0.4, 0.2, 0.05, 0.0],
    "gvp": [0.9, 0.75, 0.6, 0.4, 0.15, 0.0],
}


@pytest.mark.parametrize("name", GRIDS)
def test_every_point_is_that_of_the_paper(record, name):
    """From the recorded outputs of the model; the noise of each step is that of the key of the steps left."""
    process, times = PROCESSES[name], np.array(GRIDS[name])
    S = len(times) - 1
    names = SOLVERS if name != "gvp" else ("2m", "2s", "unipc-3-bh2", "euler", "euler-churn")
    recorded = {solver: record(smooth_model) for solver in names}

    @quick_jit
    def run(x_T):
        def draw(solver):
            denoise = Objective(process, X0(), False).predict(recorded[solver][0])
            return sample(SOLVERS[solver], denoise, process, x_T, times, jax.random.key(7))

        return {solver: draw(solver) for solver in names}

    samples = run(normal(0))
    jax.effects_barrier()
    grid, x_T = solvers.Grid(process, times), normal(0).astype(np.float64)
    for solver, x_0 in samples.items():
        points, at, outputs = zip(*recorded[solver][1], strict=True)
        assert len(points) == num_evaluations(SOLVERS[solver], S) == (2 * S - 1 if solver == "2s" else S)
        evaluated = times[:-1]
        if solver == "2s":
            evaluated = np.append(np.stack([times[:-2], solvers.middles(process, times)], 1).ravel(), times[-2])
        np.testing.assert_allclose(np.array(at)[:, 0], process.model_time(evaluated), rtol=1e-6, err_msg=solver)
        assert process.clean not in evaluated
        expected = ORACLES[solver](grid, x_T, [np.float64(output) for output in outputs], noises_by_steps_left(S))
        for i, (point, wanted) in enumerate(zip([*points, x_0], expected, strict=True)):
            atol = UPDATE_RTOL * max(np.abs(wanted).max(), 1)
            np.testing.assert_allclose(point, wanted, rtol=0, atol=atol, err_msg=f"{solver}, point {i}")


def test_parity_with_diffusers(record):
    """On the same steps of the linear schedule; 2S of diffusers counts its middles as steps."""
    torch = pytest.importorskip("torch", reason="parity with diffusers needs PyTorch")
    diffusers = pytest.importorskip("diffusers", reason="parity with diffusers needs diffusers")
    times = np.array([999, 870, 700, 500, 300, 120, 30, 0, -1])
    steps = {"2s": np.append(np.stack([times[:-2], solvers.middles(FULL, times)], 1).ravel(), times[-2:])}
    multistep, singlestep = diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverSinglestepScheduler
    schedulers = {"2m": (multistep, {"solver_order": 2}), "2s": (singlestep, {"lower_order_final": True})}
    for name, solver in UNIPC.items():
        options = {"solver_order": solver.order, "solver_type": solver.variant}
        schedulers[name] = (diffusers.UniPCMultistepScheduler, options)
    recorded = {name: record(smooth_model) for name in schedulers}

    @quick_jit
    def run(x_T):
        predict = Objective(FULL, X0(), False).predict
        return {name: sample(SOLVERS[name], predict(recorded[name][0]), FULL, x_T, times) for name in schedulers}

    samples = run(normal(0))
    jax.effects_barrier()
    for name, (scheduler, options) in schedulers.items():
        scheduler = scheduler(1000, beta_end=0.02, prediction_type="sample", final_sigmas_type="zero", **options)
        grid = solvers.Grid(FULL, steps.get(name, times))
        scheduler.set_timesteps(len(grid.t) - 1)
        scheduler.timesteps = torch.from_numpy(grid.t[:-1])
        scheduler.sigmas = torch.from_numpy(grid.sigma / grid.alpha)
        points = [x for x, _, _ in recorded[name][1]] + [samples[name]]
        x = torch.from_numpy(normal(0).astype(np.float64))
        num_compared = len(grid.t) - 1 - ("bh1" in name)  # diffusers' last step to sigma = 0 is NaN with bh1
        for i, (_, _, output) in enumerate(recorded[name][1][:num_compared]):
            x = scheduler.step(torch.from_numpy(np.float64(output)), scheduler.timesteps[i], x).prev_sample
            expected = x.numpy()
            atol = UPDATE_RTOL * np.abs(expected).max()
            np.testing.assert_allclose(points[i + 1], expected, rtol=0, atol=atol, err_msg=f"{name}, step {i}")


# Convergence


# Sampler, order, grid and numbers of steps, processes. The grids begin at the first time, where alpha may be 0, and the
# step to the data is so short that its error of first order is not seen.
#
# In lambda, an even grid in t of a flow has steps near noise that do not get shorter, so that no method of DPM-Solver's
# kind shows more than order 2 there; the grids in log-SNR do it. UniPC-3's first step has an error of third order:
# order 4 is seen only where it is short, as in `karras`.
FAMILIES = ("linear, T = 100,000", "flow", "zero terminal SNR, T = 100,000")
ORDERS = {
    "euler": (Euler(), 1, "log_snr", (24, 48, 96), ("linear, T = 100,000",)),
    "euler, gvp": (Euler(), 1, "uniform", (24, 48, 96), ("gvp",)),
    "ddim": (DDIM(), 1, "log_snr", (24, 48, 96), ("flow",)),
    "heun": (Heun(), 2, "log_snr", (24, 48, 96), ("flow",)),
    "2m": (DPMSolverPP("2m"), 2, "log_snr", (24, 48, 96), FAMILIES),
    "2s": (DPMSolverPP("2s"), 2, "log_snr", (24, 48, 96), FAMILIES),
    "unipc-1": (UniPC(1), 2, "log_snr", (24, 48, 96), FAMILIES),
    "unipc-2": (UniPC(2), 3, "log_snr", (24, 48, 96), FAMILIES),
    "unipc-2-bh1": (UniPC(2, "bh1"), 3, "log_snr", (48, 96), ("flow",)),
    "unipc-3": (UniPC(3), 3, "log_snr", (24, 48, 96), ("linear, T = 100,000",)),
    "unipc-3, short first steps": (UniPC(3), 4, "karras", (48, 96), FAMILIES),
}
PROCESSES["zero terminal SNR, T = 100,000"] = linear_schedule(100_000, True)


@pytest.mark.parametrize(
    "solver, order, grid, counts, family",
    [pytest.param(*row[:4], family, id=f"{name}-{family}") for name, row in ORDERS.items() for family in row[4]],
)
def test_order_of_convergence_to_the_probability_flow(solver, order, grid, counts, family):
    process, x_T = PROCESSES[family], normal(1, (4, 96))

    @quick_jit
    def run(x_T):
        grids = [TIME_GRIDS[grid](process, num_steps) for num_steps in counts]
        return [sample(solver, target_denoise(process), process, x_T, times) for times in grids]

    first = process.times(1)[:1]
    alpha, sigma = process.alpha(first).item(), process.sigma(first).item()
    flow = oracle.probability_flow(alpha, sigma, MEAN, DEVIATION, np.float64(x_T))
    errors = [np.sqrt(np.mean((x_0 - flow) ** 2)) for x_0 in run(x_T)]
    measured = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert measured == pytest.approx(order, abs=ORDER_TOLERANCE), errors


# Stochastic samplers


def moments(oracle_update, process, times):
    """Mean and deviation of x_0: the updates are affine in x_T and in the noises, one coordinate for each."""
    grid, S = solvers.Grid(process, times), len(times) - 1
    basis = np.eye(S + 2)  # 1, x_T, and the noises
    mean, variance = oracle.marginal(grid.alpha[0], grid.sigma[0], MEAN, DEVIATION)
    points, outputs = [basis[1]], []
    for i in range(S):
        offset = oracle.optimal_prediction(grid.alpha[i], grid.sigma[i], MEAN, DEVIATION, np.array([0.0, 1.0]))[0]
        outputs.append(offset[0] * basis[0] + (offset[1] - offset[0]) * points[-1])
        padded = outputs + [0 * basis[0]] * (S - len(outputs))
        points = oracle_update(grid, basis[1], padded, basis[2:])[: i + 2]
    x_0 = points[-1]
    return x_0[0] + x_0[1] * mean, math.sqrt(x_0[1] ** 2 * variance + (x_0[2:] ** 2).sum())


STOCHASTIC = {
    "sde_2m": (solvers.dpm_sde_2m, "linear", "log_snr"),
    "sde_2m, flow": (solvers.dpm_sde_2m, "flow", "log_snr"),
    "euler-churn": (ORACLES["euler-churn"], "flow", "uniform"),
    "euler-churn, linear": (ORACLES["euler-churn"], "linear", "quadratic"),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_solvers_reproduce_the_target(name):
    update, family, grid = STOCHASTIC[name]
    process, solver = PROCESSES[family], SOLVERS[name.split(",")[0]]
    times = TIME_GRIDS[grid](process, 100)
    mean, variance = oracle.marginal(process.alpha(times[0]), process.sigma(times[0]), MEAN, DEVIATION)

    @jax.jit
    def run(x_T):
        return sample(solver, target_denoise(process), process, x_T, times, jax.random.key(0))

    x_0 = np.float64(run((mean + np.sqrt(variance) * normal(2, (8, 64, 64, 1))).astype(np.float32)))
    wanted_mean, wanted_deviation = moments(update, process, times)
    standard_error = wanted_deviation / np.sqrt(x_0.size)
    assert x_0.mean() == pytest.approx(wanted_mean, abs=STANDARD_ERRORS * standard_error)
    assert x_0.std() == pytest.approx(wanted_deviation, abs=STANDARD_ERRORS * standard_error / np.sqrt(2))
    assert (wanted_mean, wanted_deviation) == pytest.approx((MEAN, DEVIATION), abs=BIAS)


def test_moments_converge_to_those_of_the_target():
    """SDE-2M's at second order, Euler's at first; by the recursion of the updates."""
    for name, order, counts in (("sde_2m, flow", 2, (50, 100)), ("euler-churn", 1, (50, 100))):
        update, family, grid = STOCHASTIC[name]
        process = PROCESSES[family]
        errors = [abs(moments(update, process, TIME_GRIDS[grid](process, S))[1] - DEVIATION) for S in counts]
        measured = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
        assert measured == pytest.approx(order, abs=ORDER_TOLERANCE), (name, errors)


# Ends, options, keys


def test_euler_is_ddim_but_for_gvp():
    @quick_jit
    def run(x_T):
        def draw(solver, process):
            denoise = Objective(process, X0(), False).predict(smooth_model)
            return sample(solver, denoise, process, x_T, process.times(5))

        return {name: (draw(Euler(), p), draw(DDIM(), p)) for name, p in PROCESSES.items() if "100,000" not in name}

    for name, (of_euler, of_ddim) in run(normal(0)).items():
        difference = np.abs(of_euler - of_ddim).max()
        assert (difference < 1e-5) == (name != "gvp"), (name, difference)


SHORT = [(PROCESSES["zero terminal SNR"], X0()), (cosine_schedule(1), Noise()), (RectifiedFlow(), X0())]


def test_one_step_returns_the_predicted_data():
    @quick_jit
    def run(x_T):
        results = []
        for process, target in SHORT:
            denoise = Objective(process, target, False).predict(smooth_model)
            times = process.times(1)
            predicted = denoise(x_T, jnp.full(SHAPE[:1], times[0])).x_0
            draws = {n: sample(s, denoise, process, x_T, times, jax.random.key(0)) for n, s in SOLVERS.items()}
            results.append((predicted, draws))
        return results

    for predicted, draws in run(normal(0)):
        for name, x_0 in draws.items():
            atol = UPDATE_RTOL * np.abs(predicted).max()
            np.testing.assert_allclose(x_0, predicted, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("process", [PROCESSES[name] for name in (*GRIDS, "cosine")], ids=[*GRIDS, "cosine"])
def test_coefficients_are_finite(process):
    """Also from a first time without signal, and for two or three steps; and those of float32 do not overflow."""
    for solver in SOLVERS.values():
        for grid in TIME_GRIDS.values():
            for num_steps in (1, 2, 3, 10):
                with np.errstate(all="raise", under="ignore"):
                    rows = solver.plan(process, grid(process, num_steps))
                for values in rows:
                    assert len(values) == num_steps
                    assert np.isfinite(values.astype(np.float32)).all()
                assert process.clean not in np.append(rows.t, getattr(rows, "middle", rows.t))


def test_number_of_evaluations():
    expected = {DDPM(): 10, DDIM(): 10, Euler(): 10, Heun(): 19, UniPC(3): 10}
    expected |= {DPMSolverPP("2m"): 10, DPMSolverPP("2s"): 19, DPMSolverPP("sde_2m"): 10}
    assert {solver: num_evaluations(solver, 10) for solver in expected} == expected
    assert num_evaluations(Heun(), 1) == 1


def test_the_key_decides_of_those_that_add_noise():
    @quick_jit
    def run(x_T, seed):
        denoise = target_denoise(FULL)
        return {n: sample(s, denoise, FULL, x_T, FULL.times(4), jax.random.key(seed)) for n, s in SOLVERS.items()}

    x_0, other = (run(normal(0), seed) for seed in (0, 1))
    differing = {name for name in SOLVERS if not np.array_equal(x_0[name], other[name])}
    assert differing == {name for name, solver in SOLVERS.items() if solver.is_stochastic} == {"sde_2m", "euler-churn"}
    for name in differing:
        with pytest.raises(ValueError, match="needs a key"):
            sample(SOLVERS[name], target_denoise(FULL), FULL, normal(0), FULL.times(4))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DPMSolverPP("3m"), "variant is '3m'; choose one of 2m, 2s, sde_2m"),
        (lambda: UniPC(4), "order must be from 1 to 3, got 4"),
        (lambda: UniPC(2, "bh3"), "variant is 'bh3'; choose one of bh1, bh2"),
        (lambda: Euler(-0.1), "churn must be from 0 to 100, got -0.1"),
    ],
)
def test_wrong_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
