"""What selective SSMs should compute, in NumPy float64, written from the formulas of Mamba (arXiv 2312.00752).

    x_l = exp(dt_l A) x_{l-1} + g_l B_l u_l,    y_l = sum_n C_l x_l + D u_l,    g_l = dt_l or (exp(dt_l A) - 1) / A

with u, dt, y [B, L, D], A [D, N], B and C [B, L, N], D [D]. The layer S6 computes dt, B and C from u. Gradients are
written by hand; "d_z" is the derivative of sum(dy * y) by z.
"""

import numpy as np

NAMES = ("u", "dt", "A", "B", "C", "D")


def _exact(values):
    return {name: np.asarray(value, np.float64) for name, value in values.items()}


def _flipped(values, names):
    return values | {name: values[name][:, ::-1] for name in names}


def _forward(v, discretization):
    """decay, gain and x [B, L, D, N]."""
    dt_A = v["dt"][..., None] * v["A"]
    decay = np.exp(dt_A)
    gain = np.expm1(dt_A) / v["A"] if discretization == "zoh" else np.broadcast_to(v["dt"][..., None], dt_A.shape)
    x, states = np.zeros_like(dt_A[:, 0]), []
    for k in range(dt_A.shape[1]):
        x = decay[:, k] * x + gain[:, k] * v["B"][:, k, None, :] * v["u"][:, k, :, None]
        states.append(x)
    return decay, gain, np.stack(states, 1)


def scan(values, *, reverse=False, discretization="euler"):
    """y [B, L, D] of the arrays by `NAMES`."""
    v = _exact(values)
    if reverse:
        return scan(_flipped(v, ("u", "dt", "B", "C")), discretization=discretization)[:, ::-1]
    _, _, x = _forward(v, discretization)
    return np.einsum("bln,bldn->bld", v["C"], x) + v["D"] * v["u"]


def scan_gradients(values, dy, *, reverse=False, discretization="euler"):
    """The gradients of sum(dy * y) by the arrays of `NAMES`; a_l = C_l dy_l + decay_{l+1} a_{l+1} is that by x_l."""
    v, dy = _exact(values), np.asarray(dy, np.float64)
    if reverse:
        of_sequences = ("u", "dt", "B", "C")
        found = scan_gradients(_flipped(v, of_sequences), dy[:, ::-1], discretization=discretization)
        return _flipped(found, of_sequences)
    decay, gain, x = _forward(v, discretization)
    adjoint, a = np.zeros_like(x[:, 0]), np.zeros_like(x)
    for k in reversed(range(x.shape[1])):
        adjoint = adjoint + v["C"][:, k, None, :] * dy[:, k, :, None]
        a[:, k] = adjoint
        adjoint = decay[:, k] * adjoint
    before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], 1)
    d_exponent = a * before * decay  # by dt A
    d_gain = a * v["B"][:, :, None, :] * v["u"][..., None]
    if discretization == "zoh":
        gain_by_dt, gain_by_A = decay, (v["dt"][..., None] * decay - gain) / v["A"]
    else:
        gain_by_dt, gain_by_A = 1.0, 0.0
    return {
        "u": np.einsum("bldn,bldn,bln->bld", a, gain, v["B"]) + v["D"] * dy,
        "dt": (d_exponent * v["A"] + d_gain * gain_by_dt).sum(-1),
        "A": (d_exponent * v["dt"][..., None] + d_gain * gain_by_A).sum((0, 1)),
        "B": np.einsum("bldn,bldn,bld->bln", a, gain, v["u"]),
        "C": np.einsum("bld,bldn->bln", dy, x),
        "D": np.einsum("bld,bld->d", dy, v["u"]),
    }


def _projected(p, u, num_states):
    """The arrays by `NAMES`, and what lies on the way to dt: its low rank, and the argument of softplus."""
    low, B, C = np.split(u @ p["x_proj"], [p["dt_proj"].shape[1], p["dt_proj"].shape[1] + num_states], -1)
    before_softplus = low @ p["dt_proj"].T + p["dt_bias"]
    dt = np.logaddexp(0, before_softplus)
    return {"u": u, "dt": dt, "A": -np.exp(p["A_log"]), "B": B, "C": C, "D": p["D"]}, low, before_softplus


def layer(parameters, u, **options):
    """y [B, L, D] of one direction of S6."""
    p = _exact(parameters)
    return scan(_projected(p, np.asarray(u, np.float64), p["A_log"].shape[1])[0], **options)


def layer_gradients(parameters, u, dy, **options):
    """The gradients of sum(dy * y) of one direction of S6: by its parameters, and by u."""
    p, u = _exact(parameters), np.asarray(u, np.float64)
    values, low, before_softplus = _projected(p, u, p["A_log"].shape[1])
    d = scan_gradients(values, dy, **options)
    d_before = d["dt"] / (1 + np.exp(-before_softplus))
    d_projected = np.concatenate([d_before @ p["dt_proj"], d["B"], d["C"]], -1)
    d_parameters = {
        "A_log": d["A"] * values["A"],
        "x_proj": np.einsum("bld,blk->dk", u, d_projected),
        "dt_proj": np.einsum("bld,blr->dr", d_before, low),
        "dt_bias": d_before.sum((0, 1)),
        "D": d["D"],
    }
    return d_parameters, d["u"] + d_projected @ p["x_proj"].T
