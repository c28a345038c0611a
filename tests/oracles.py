"""What the SSM should compute, in NumPy float64, written from the formulas and not from the package.

One channel with diagonal state matrix Lambda, step dt and complex B, C [N/2] is (S4D, arXiv 2206.11893, section 3)

    x_k = Lambda_bar x_{k-1} + B_bar u_k,    y_k = 2 Re(C . x_k) + D u_k

with Lambda_bar and B_bar from the zero-order hold or the bilinear transform. The functions take the real parameters as
a mapping with the keys of `init_s4d`: Lambda = -exp(log_neg_re) + i im, dt = exp(log_dt), and complex B and C as a last
axis of two. Dimensions: B batch, L sequence, D channels, N real state size.

Gradients are written by hand. For complex z, "d_z" stands for dS/dRe z + i dS/dIm z, where S is the real number
sum(dy * y); a holomorphic w = f(z) then gives d_z = conj(f'(z)) d_w.
"""

import numpy as np

REAL_PARAMETERS = ("log_neg_re", "im", "B", "C", "log_dt", "D")


def normal(seed, *shape):
    """Normal numbers, float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def exactly(real, params):
    """Float64 parameters with the Lambda and dt of `params`: exp(log_dt) is rounded, which LegS turns into 2e-5."""
    exact = {name: np.asarray(value, np.float64) for name, value in real.items()}
    exact["log_dt"] = np.log(np.asarray(params.dt, np.float64))
    exact["log_neg_re"] = np.log(-np.asarray(params.Lambda.real, np.float64))
    return exact


def complex_parameters(real):
    """Lambda, B, C [D, N/2] complex128 and dt, D [D] float64 of the real parameters."""
    real = {name: np.asarray(value, np.float64) for name, value in real.items()}
    return {
        "Lambda": -np.exp(real["log_neg_re"]) + 1j * real["im"],
        "B": real["B"][..., 0] + 1j * real["B"][..., 1],
        "C": real["C"][..., 0] + 1j * real["C"][..., 1],
        "dt": np.exp(real["log_dt"]),
        "D": real["D"],
    }


def discretize(Lambda, B, dt, discretization):
    """Lambda_bar and B_bar [D, N/2] for Lambda, B [D, N/2] and dt [D]."""
    Lambda, B = np.asarray(Lambda, np.complex128), np.asarray(B, np.complex128)
    dt = np.asarray(dt, np.float64)[:, None]
    if discretization == "zoh":
        return np.exp(dt * Lambda), np.expm1(dt * Lambda) / Lambda * B
    assert discretization == "bilinear", discretization
    denominator = 1 - dt * Lambda / 2
    return (1 + dt * Lambda / 2) / denominator, dt * B / denominator


def kernel(Lambda, B, C, dt, length, discretization):
    """K[l] = 2 Re sum_n C_n B_bar_n Lambda_bar_n**l [D, L], from the Vandermonde array [D, N/2, L]."""
    Lambda_bar, B_bar = discretize(Lambda, B, dt, discretization)
    vandermonde = Lambda_bar[..., None] ** np.arange(length)
    return 2 * np.einsum("dn,dnl->dl", np.asarray(C, np.complex128) * B_bar, vandermonde).real


def _states(Lambda_bar, B_bar, u):
    """x_0 ... x_{L-1} [L, B, D, N/2] from u [B, L, D]."""
    x = np.zeros((u.shape[0], *Lambda_bar.shape), np.complex128)
    states = np.empty((u.shape[1], *x.shape), np.complex128)
    for k in range(u.shape[1]):
        x = Lambda_bar * x + B_bar * u[:, k, :, None]
        states[k] = x
    return states


def recurrence(real, u, *, discretization="zoh", reverse=False):
    """y [B, L, D] of u [B, L, D]; in reverse, x_k follows from x_{k+1}."""
    u = np.asarray(u, np.float64)
    if reverse:
        return recurrence(real, u[:, ::-1], discretization=discretization)[:, ::-1]
    p = complex_parameters(real)
    Lambda_bar, B_bar = discretize(p["Lambda"], p["B"], p["dt"], discretization)
    x = _states(Lambda_bar, B_bar, u)
    return 2 * np.einsum("dn,lbdn->bld", p["C"], x).real + p["D"] * u


def recurrence_gradients(real, u, dy, *, discretization="zoh", reverse=False):
    """The gradients of sum(dy * y), y = recurrence(real, u): a dict of the real parameters, and du [B, L, D]."""
    d_real, du = recurrence_gradients_by_state(real, u, dy, discretization=discretization, reverse=reverse)
    return d_real | {"log_dt": d_real["log_dt"].sum(-1)}, du


def recurrence_gradients_by_state(real, u, dy, *, discretization="zoh", reverse=False):
    """`recurrence_gradients`, but that by log_dt, a sum over states, is left as its terms [D, N/2].

    The adjoint state a_k = d_x_k runs against the recurrence: a_k = 2 conj(C) dy_k + conj(Lambda_bar) a_{k+1}.
    """
    u, dy = np.asarray(u, np.float64), np.asarray(dy, np.float64)
    if reverse:
        d_real, du = recurrence_gradients_by_state(real, u[:, ::-1], dy[:, ::-1], discretization=discretization)
        return d_real, du[:, ::-1]
    p = complex_parameters(real)
    Lambda_bar, B_bar = discretize(p["Lambda"], p["B"], p["dt"], discretization)
    x = _states(Lambda_bar, B_bar, u)
    a = _states(Lambda_bar.conj(), 2 * p["C"].conj(), dy[:, ::-1])[::-1]

    d_C = 2 * np.einsum("bld,lbdn->dn", dy, x.conj())
    d_B_bar = np.einsum("bld,lbdn->dn", u, a)
    d_Lambda_bar = np.einsum("lbdn,lbdn->dn", x[:-1].conj(), a[1:])
    du = np.einsum("dn,lbdn->bld", B_bar.conj(), a).real + p["D"] * dy
    d_Lambda, d_B, d_dt = _discretize_gradients(p["Lambda"], p["B"], p["dt"], d_Lambda_bar, d_B_bar, discretization)
    d_real = {
        "log_neg_re": d_Lambda.real * p["Lambda"].real,
        "im": d_Lambda.imag,
        "B": np.stack([d_B.real, d_B.imag], -1),
        "C": np.stack([d_C.real, d_C.imag], -1),
        "log_dt": d_dt * p["dt"][:, None],
        "D": np.einsum("bld,bld->d", dy, u),
    }
    return d_real, du


def _discretize_gradients(Lambda, B, dt, d_Lambda_bar, d_B_bar, discretization):
    """d_Lambda, d_B and the terms of d_dt, [D, N/2], from the derivatives of `discretize`, each written out."""
    dt = dt[:, None]
    if discretization == "zoh":
        Lambda_bar = np.exp(dt * Lambda)
        B_bar_by_B = np.expm1(dt * Lambda) / Lambda
        Lambda_bar_by_Lambda, Lambda_bar_by_dt = dt * Lambda_bar, Lambda * Lambda_bar
        B_bar_by_Lambda, B_bar_by_dt = (dt * Lambda_bar - B_bar_by_B) / Lambda * B, Lambda_bar * B
    else:
        denominator = 1 - dt * Lambda / 2
        B_bar_by_B = dt / denominator
        Lambda_bar_by_Lambda, Lambda_bar_by_dt = dt / denominator**2, Lambda / denominator**2
        B_bar_by_Lambda, B_bar_by_dt = dt**2 / 2 * B / denominator**2, B / denominator**2
    d_Lambda = Lambda_bar_by_Lambda.conj() * d_Lambda_bar + B_bar_by_Lambda.conj() * d_B_bar
    d_dt = Lambda_bar_by_dt.conj() * d_Lambda_bar + B_bar_by_dt.conj() * d_B_bar
    return d_Lambda, B_bar_by_B.conj() * d_B_bar, d_dt.real


def relative_error(actual, expected, scale=None):
    """|actual - expected| / |scale| of whole arrays, in the Euclidean norm; the scale is `expected` unless given."""
    actual = np.asarray(actual)
    expected = np.asarray(expected)
    wide = np.complex128 if np.iscomplexobj(expected) else np.float64
    assert actual.shape == expected.shape, f"shapes differ: {actual.shape} and {expected.shape}"
    return np.linalg.norm(actual.astype(wide) - expected) / np.linalg.norm(expected if scale is None else scale)
