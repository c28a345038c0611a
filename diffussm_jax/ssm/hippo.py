"""HiPPO-LegS and the diagonal state matrices that approximate it, and a random one.

The LegS matrix (HiPPO, arXiv 2008.07669; in this form S4, arXiv 2111.00396, equation 2) is normal plus rank one:
A = V diag(Lambda) V* - P P^T with P_n = sqrt(n + 1/2). S4D-LegS keeps only Lambda. S4D-Lin and S4D-Inv are closed forms
near it (S4D, arXiv 2206.11893, section 4). Of each conjugate pair of eigenvalues the one with positive imaginary part
is kept. Everything is computed once, at initialisation, in NumPy float64.
"""

import numpy as np


def _check_state_size(state_size: int) -> None:
    if state_size < 2 or state_size % 2:
        raise ValueError(f"state_size must be even and at least 2 (it is held as conjugate pairs), got {state_size}")


def legs(state_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The HiPPO-LegS system x' = A x + B u: A [N, N] and B [N], float64."""
    n = np.arange(state_size)
    B = np.sqrt(2 * n + 1.0)
    A = -np.tril(np.outer(B, B), -1) - np.diag(n + 1.0)
    return A, B


def dplr_legs(state_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """HiPPO-LegS in diagonal plus low-rank form (S4, arXiv 2111.00396, theorem 1).

    A = V (diag(Lambda) - P P*) V*, with P and B in the eigenbasis.

    Returns:
      Lambda [N], P [N], B [N] complex128, ordered by imaginary part, and the unitary V [N, N].

    Raises:
      ValueError: the state size is odd or below 2.
    """
    _check_state_size(state_size)
    A, B = legs(state_size)
    P = np.sqrt(np.arange(state_size) + 0.5)
    normal = A + np.outer(P, P)  # -1/2 I plus a skew-symmetric matrix, whose eigenvalues eigh gives stably
    real_part = np.mean(np.diag(normal))
    imag_part, V = np.linalg.eigh(-1j * (normal - real_part * np.eye(state_size)))
    return real_part + 1j * imag_part, V.conj().T @ P, V.conj().T @ B, V


def s4d_legs(state_size: int) -> tuple[np.ndarray, np.ndarray]:
    """S4D-LegS: the diagonal part of HiPPO-LegS, with its input vector in the eigenbasis.

    Returns:
      Lambda [N/2] and B [N/2], complex128.

    Raises:
      ValueError: the state size is odd or below 2.
    """
    Lambda, _, B, _ = dplr_legs(state_size)
    return Lambda[state_size // 2 :], B[state_size // 2 :]


def s4d_lin(state_size: int) -> tuple[np.ndarray, np.ndarray]:
    """S4D-Lin: Lambda_n = -1/2 + i pi n, B = 1 (S4D, equation 9); see `s4d_legs`."""
    _check_state_size(state_size)
    n = np.arange(state_size // 2)
    return -0.5 + 1j * np.pi * n, np.ones(state_size // 2, np.complex128)


def s4d_inv(state_size: int) -> tuple[np.ndarray, np.ndarray]:
    """S4D-Inv: Lambda_n = -1/2 + i (N/pi) (N/(2n + 1) - 1), B = 1 (S4D, equation 8); see `s4d_legs`."""
    _check_state_size(state_size)
    n = np.arange(state_size // 2)
    imag_part = state_size / np.pi * (state_size / (2 * n + 1) - 1)
    return -0.5 + 1j * imag_part, np.ones(state_size // 2, np.complex128)


def s4d_random(state_size: int) -> tuple[np.ndarray, np.ndarray]:
    """S4D-Lin with random parts: Re Lambda_n uniform in [-1, 0), Im Lambda_n in (0, pi N/2], B = 1; see `s4d_legs`.

    These are the random real and imaginary parts that S4D was compared with (arXiv 2206.11893, section 5), in the
    ranges of its code. This is one fixed draw; `init_s4d` draws for each channel.
    """
    _check_state_size(state_size)
    neg_re, im = 1 - np.random.default_rng(0).uniform(size=(2, state_size // 2))
    return -neg_re + 1j * np.pi * state_size / 2 * im, np.ones(state_size // 2, np.complex128)
