"""The bidirectional SSM of public code, to compare speeds with: in JAX, and in PyTorch if it is installed.

Both naive forms follow public code (S4D, arXiv 2206.11893, listing 1). For each direction they make the full
Vandermonde array [D, N/2, L] and from it the kernel

    K[l] = 2 Re sum_n C_n B_bar_n exp(dt Lambda_n l),

convolve by FFTs of length 2L, and add the skip D u. `torch_two_level` makes the kernel from about 2 sqrt(L) powers
(`ssm.kernel`), and both directions from one transform of u.
"""

import importlib.util
import math
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.ssm import SSMParams, zoh

NAIVE = "fft_naive"
TORCH_METHODS = ("torch_naive", "torch_two_level")


def fft_naive(forward: SSMParams, backward: SSMParams, u: jax.Array) -> jax.Array:
    """The bidirectional SSM by the naive form of public code: [B, L, D] -> [B, L, 2D]; for comparison only."""
    L, dtype = u.shape[1], u.dtype

    def one_direction(params, u):
        Lambda_bar, B_bar = zoh(params.Lambda, params.B, params.dt)
        vandermonde = jnp.exp(jnp.log(Lambda_bar)[..., None] * jnp.arange(L))
        kernel = 2 * jnp.einsum("dn,dnl->dl", params.C * B_bar, vandermonde).real
        u = u.swapaxes(1, 2)
        y = jnp.fft.irfft(jnp.fft.rfft(u, 2 * L) * jnp.fft.rfft(kernel, 2 * L), 2 * L)[..., :L]
        return (y + params.D[:, None] * u).swapaxes(1, 2)

    u = u.astype(jnp.float32)
    y = jnp.concatenate([one_direction(forward, u), jnp.flip(one_direction(backward, jnp.flip(u, 1)), 1)], -1)
    return y.astype(dtype)


def torch_left_out() -> str:
    """Why PyTorch cannot run on the device that JAX uses; "" if it can."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    import torch

    if jax.default_backend() == "cpu" or (jax.default_backend() == "gpu" and torch.cuda.is_available()):
        return ""
    return f"PyTorch has no {jax.default_backend()} here"


def torch_programs(
    name: str, forward: dict, backward: dict, u: jax.Array, dy: jax.Array
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward pass in PyTorch, and forward with all gradients; on a CPU with all its cores.

    Args:
      name: one of `TORCH_METHODS`.
      forward: the real parameters of `init_s4d`.
      backward: likewise.
      u: [B, L, D].
      dy: [B, L, 2D], the gradient of y.

    Returns:
      () -> y, and () -> (y, gradients of the parameters in the order of both mappings, du), torch tensors.
    """
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.set_num_threads(os.cpu_count())

    def tensor(x, **options):
        exact = torch.from_numpy(np.array(x.astype(jnp.float32)))
        return exact.to(device, torch.bfloat16 if x.dtype == jnp.bfloat16 else torch.float32).requires_grad_(**options)

    method = {"torch_naive": _torch_naive, "torch_two_level": _torch_two_level}[name]
    forward, backward = ({k: tensor(x) for k, x in real.items()} for real in (forward, backward))
    u, dy = tensor(u), tensor(dy, requires_grad=False)

    def finished(x):
        if device == "cuda":
            torch.cuda.synchronize()
        return x

    def forward_pass():
        with torch.no_grad():
            return finished(method(forward, backward, u))

    def with_gradients():
        y = method(forward, backward, u)
        return finished((y.detach(), *torch.autograd.grad(y, [*forward.values(), *backward.values(), u], dy)))

    return forward_pass, with_gradients


def _torch_terms(real):
    """dt Lambda and 2 C B_bar, complex [D, N/2], from real parameters."""
    import torch

    Lambda = torch.complex(-torch.exp(real["log_neg_re"]), real["im"])
    B, C = torch.view_as_complex(real["B"]), torch.view_as_complex(real["C"])
    dt_Lambda = torch.exp(real["log_dt"])[:, None] * Lambda
    return dt_Lambda, 2 * C * B * torch.expm1(dt_Lambda) / Lambda


def _torch_naive(forward, backward, u):
    import torch

    L = u.shape[1]

    def one_direction(real, u):
        dt_Lambda, gain = _torch_terms(real)
        vandermonde = torch.exp(dt_Lambda[..., None] * torch.arange(L, device=u.device))
        kernel = torch.einsum("dn,dnl->dl", gain, vandermonde).real
        u = u.transpose(1, 2)
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * L) * torch.fft.rfft(kernel, n=2 * L), n=2 * L)[..., :L]
        return (y + real["D"][:, None] * u).transpose(1, 2)

    x = u.float()
    y = torch.cat([one_direction(forward, x), one_direction(backward, x.flip(1)).flip(1)], -1)
    return y.to(u.dtype)


def _torch_two_level(forward, backward, u):
    import torch

    L = u.shape[1]
    num_inner = math.isqrt(L - 1) + 1
    num_outer = -(-L // num_inner)

    def spectrum(real):
        dt_Lambda, gain = _torch_terms(real)
        i, j = (torch.arange(n, device=u.device) for n in (num_outer, num_inner))
        outer = gain[..., None] * torch.exp(dt_Lambda[..., None] * (i * num_inner))
        inner = torch.exp(dt_Lambda[..., None] * j)
        left = torch.cat([outer.real, -outer.imag], 1)
        right = torch.cat([inner.real, inner.imag], 1)
        kernel = torch.einsum("dni,dnj->dij", left, right).reshape(len(left), -1)[:, :L]
        return torch.fft.rfft(kernel, n=2 * L) + real["D"][:, None]  # the skip is a tap at lag 0

    x = torch.fft.rfft(u.float().transpose(1, 2), n=2 * L)
    spectra = torch.stack([spectrum(forward), spectrum(backward).conj()])
    y = torch.fft.irfft(x * spectra[:, None], n=2 * L)[..., :L]  # [2, B, D, L]
    return y.permute(1, 3, 0, 2).reshape(*u.shape[:2], -1).to(u.dtype)
