"""What SSMs with a dense state matrix should compute, in NumPy float64: the recurrence and its adjoint, by hand.

One channel with real A [N, N], B and C [N], step dt and skip D is

    x_k = A_bar x_{k-1} + B_bar u_k,    y_k = C . x_k + D u_k

with the generalised bilinear transform A_bar = M^-1 (I + (1 - alpha) dt A), B_bar = M^-1 dt B, M = I - alpha dt A
(LSSL, arXiv 2110.13985, section 2). Systems are dicts with A [D, N, N], B and C [D, N], dt and D [D].

A diagonal plus low-rank system of conjugate pairs is such a system in the coordinates (Re x, Im x): `from_pairs`, and
`to_pairs` for gradients.
"""

import numpy as np
import oracles


def discretize(system, alpha):
    """A_bar [D, N, N], B_bar [D, N] and M."""
    A, dt = system["A"], system["dt"][:, None, None]
    identity = np.eye(A.shape[-1])
    M = identity - alpha * dt * A
    return (
        np.linalg.solve(M, identity + (1 - alpha) * dt * A),
        np.linalg.solve(M, dt * system["B"][..., None])[..., 0],
        M,
    )


def _states(A_bar, inputs):
    """x_0 ... x_{L-1} [L, B, D, N] of x_k = A_bar x_{k-1} + inputs_k."""
    states = np.empty_like(inputs)
    x = np.zeros(inputs.shape[1:])
    for k in range(len(inputs)):
        x = states[k] = np.einsum("dnm,bdm->bdn", A_bar, x) + inputs[k]
    return states


def recurrence(system, u, *, alpha=0.5, reverse=False):
    """y [B, L, D] of u [B, L, D]; in reverse, x_k follows from x_{k+1}."""
    u = np.asarray(u, np.float64)
    if reverse:
        return recurrence(system, u[:, ::-1], alpha=alpha)[:, ::-1]
    A_bar, B_bar, _ = discretize(system, alpha)
    x = _states(A_bar, B_bar * u.swapaxes(0, 1)[..., None])
    return np.einsum("dn,lbdn->bld", system["C"], x) + system["D"] * u


def recurrence_gradients(system, u, dy, *, alpha=0.5, reverse=False):
    """The gradients of sum(dy * y), y = recurrence(system, u): a dict of those of the system, and du [B, L, D].

    The adjoint state a_k = C dy_k + A_bar^T a_{k+1} runs against the recurrence. From M A_bar = I + (1 - alpha) dt A
    follows M dA_bar = d(dt A) ((1 - alpha) I + alpha A_bar), and M dB_bar = d(dt B) + alpha d(dt A) B_bar.
    """
    u, dy = np.asarray(u, np.float64), np.asarray(dy, np.float64)
    if reverse:
        gradients, du = recurrence_gradients(system, u[:, ::-1], dy[:, ::-1], alpha=alpha)
        return gradients, du[:, ::-1]
    A, B, dt = system["A"], system["B"], system["dt"]
    A_bar, B_bar, M = discretize(system, alpha)
    x = _states(A_bar, B_bar * u.swapaxes(0, 1)[..., None])
    a = _states(A_bar.swapaxes(1, 2), system["C"] * dy.swapaxes(0, 1)[::-1, ..., None])[::-1]
    d_A_bar = np.einsum("lbdn,lbdm->dnm", a[1:], x[:-1])
    d_B_bar = np.einsum("lbdn,bld->dn", a, u)
    by_M_transposed = np.linalg.solve(M.swapaxes(1, 2), np.concatenate([d_A_bar, d_B_bar[..., None]], -1))
    of_A_bar, of_B_bar = by_M_transposed[..., :-1], by_M_transposed[..., -1]
    identity = np.eye(A.shape[-1])
    d_dt_A = of_A_bar @ ((1 - alpha) * identity + alpha * A_bar).swapaxes(1, 2)
    d_dt_A += alpha * of_B_bar[:, :, None] * B_bar[:, None]
    gradients = {
        "A": dt[:, None, None] * d_dt_A,
        "B": dt[:, None] * of_B_bar,
        "C": np.einsum("bld,lbdn->dn", dy, x),
        "dt": np.einsum("dnm,dnm->d", d_dt_A, A) + np.einsum("dn,dn->d", of_B_bar, B),
        "D": np.einsum("bld,bld->d", dy, u),
    }
    du = np.einsum("dn,lbdn->bld", B_bar, a) + system["D"] * dy
    return gradients, du


def _pair(x):
    """Complex [D, N/2] to real [D, N]: real parts, then imaginary parts."""
    return np.concatenate([x.real, x.imag], -1)


def from_pairs(pairs):
    """The dense system of x' = Lambda x - P 2 Re(P* x) + B u, y = 2 Re(C x), of Lambda, P, B, C [D, N/2], dt, D [D]."""
    Lambda, P, B, C = (np.asarray(pairs[name], np.complex128) for name in ("Lambda", "P", "B", "C"))
    A = np.zeros((*Lambda.shape[:-1], 2 * Lambda.shape[-1], 2 * Lambda.shape[-1]))
    re, im = np.arange(Lambda.shape[-1]), np.arange(Lambda.shape[-1]) + Lambda.shape[-1]
    A[:, re, re] = A[:, im, im] = Lambda.real
    A[:, im, re], A[:, re, im] = Lambda.imag, -Lambda.imag
    A -= 2 * _pair(P)[:, :, None] * _pair(P)[:, None]
    dt, D = (np.asarray(pairs[name], np.float64) for name in ("dt", "D"))
    return {"A": A, "B": _pair(B), "C": 2 * _pair(C.conj()), "dt": dt, "D": D}


def pairs_of(real, params):
    """The float64 pairs of the real parameters of `init_s4`, with the Lambda and dt of `params` (`oracles.exactly`)."""
    P = np.asarray(real["P"], np.float64)
    return oracles.complex_parameters(oracles.exactly(real, params)) | {"P": P[..., 0] + 1j * P[..., 1]}


def to_pairs(gradients, pairs):
    """The gradients by the real parameters of `init_s4`, from those of the dense system `from_pairs(pairs)`."""
    Lambda, P = np.asarray(pairs["Lambda"], np.complex128), np.asarray(pairs["P"], np.complex128)
    half, d_A = Lambda.shape[-1], gradients["A"]
    re, im = np.arange(half), np.arange(half) + half

    def split(x, sign=1):  # [D, N] to [D, N/2, 2]
        return np.stack([x[:, :half], sign * x[:, half:]], -1)

    return {
        "log_neg_re": (d_A[:, re, re] + d_A[:, im, im]) * Lambda.real,
        "im": d_A[:, im, re] - d_A[:, re, im],
        "P": split(-2 * np.einsum("dnm,dm->dn", d_A + d_A.swapaxes(1, 2), _pair(P))),
        "B": split(gradients["B"]),
        "C": split(2 * gradients["C"], -1),
        "log_dt": gradients["dt"] * np.asarray(pairs["dt"], np.float64),
        "D": gradients["D"],
    }
