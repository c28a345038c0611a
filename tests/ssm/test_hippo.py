"""HiPPO-LegS against its closed forms, its diagonal plus low-rank form, and the S4D-Lin and S4D-Inv formulas."""

import numpy as np
import pytest
import scipy.linalg
import scipy.special

from diffussm_jax.ssm import hippo

STATE_SIZES = [2, 4, 8, 64]


@pytest.mark.parametrize("N", STATE_SIZES)
def test_legs_entries(N):
    A, B = hippo.legs(N)
    for n in range(N):
        assert B[n] == pytest.approx((2 * n + 1) ** 0.5, rel=1e-15)
        for k in range(N):
            below, diagonal = -((2 * n + 1) ** 0.5) * (2 * k + 1) ** 0.5, -(n + 1)
            expected = below if n > k else diagonal if n == k else 0
            assert A[n, k] == pytest.approx(expected, rel=1e-14), (n, k)


@pytest.mark.parametrize("t", [0.0, 0.1, 1.0, 3.0])
def test_legs_impulse_response_is_legendre_polynomials(t):
    """exp(tA) B = e^-t sqrt(2n + 1) P_n(2 e^-t - 1): what LegS was derived to remember (HiPPO, arXiv 2008.07669)."""
    A, B = hippo.legs(8)
    n = np.arange(8)
    expected = np.exp(-t) * np.sqrt(2 * n + 1) * scipy.special.eval_legendre(n, 2 * np.exp(-t) - 1)
    np.testing.assert_allclose(scipy.linalg.expm(t * A) @ B, expected, atol=1e-12)


@pytest.mark.parametrize("N", STATE_SIZES)
def test_dplr_reconstructs_legs(N):
    A, B = hippo.legs(N)
    Lambda, P, B_eigen, V = hippo.dplr_legs(N)
    np.testing.assert_allclose(V @ V.conj().T, np.eye(N), atol=1e-12)
    np.testing.assert_allclose(V @ (np.diag(Lambda) - np.outer(P, P.conj())) @ V.conj().T, A, atol=1e-10)
    np.testing.assert_allclose(V @ B_eigen, B, atol=1e-10)


@pytest.mark.parametrize("N", STATE_SIZES)
def test_dplr_comes_in_conjugate_pairs(N):
    Lambda, P, B, _ = hippo.dplr_legs(N)
    assert np.all(np.diff(Lambda.imag) > 0)
    np.testing.assert_allclose(Lambda.real, -0.5, atol=1e-12)
    np.testing.assert_allclose(Lambda[::-1], Lambda.conj(), atol=1e-10)
    # Eigenvectors are free up to a phase, so of P and B only the magnitudes are the pair's own.
    np.testing.assert_allclose(np.abs(P[::-1]), np.abs(P), atol=1e-10)
    np.testing.assert_allclose(np.abs(B[::-1]), np.abs(B), atol=1e-10)


@pytest.mark.parametrize("N", STATE_SIZES)
@pytest.mark.parametrize("t", [0.01, 0.3])
def test_s4d_legs_is_the_normal_part_of_legs(N, t):
    """B^T exp(t (A + P P^T)) B, from the half of the states that is kept."""
    A, B = hippo.legs(N)
    P = np.sqrt(np.arange(N) + 0.5)
    Lambda, B_eigen = hippo.s4d_legs(N)
    assert Lambda.shape == B_eigen.shape == (N // 2,)
    assert np.all(Lambda.imag > 0)
    expected = B @ scipy.linalg.expm(t * (A + np.outer(P, P))) @ B
    actual = 2 * np.sum(np.abs(B_eigen) ** 2 * np.exp(t * Lambda)).real
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


def test_s4d_lin_formula():
    Lambda, B = hippo.s4d_lin(8)
    np.testing.assert_allclose(Lambda, [-0.5, -0.5 + 1j * np.pi, -0.5 + 2j * np.pi, -0.5 + 3j * np.pi], rtol=1e-15)
    np.testing.assert_array_equal(B, np.ones(4))


def test_s4d_inv_formula():
    Lambda, B = hippo.s4d_inv(8)
    imag_part = np.array([56, 8 * (8 / 3 - 1), 8 * (8 / 5 - 1), 8 * (8 / 7 - 1)]) / np.pi
    np.testing.assert_allclose(Lambda, -0.5 + 1j * imag_part, rtol=1e-15)
    np.testing.assert_array_equal(B, np.ones(4))


def test_s4d_inv_is_near_legs():
    """The scaling that S4D-Inv was made for (S4D, section 4.3): its two fastest states are LegS's."""
    legs = np.sort(hippo.s4d_legs(64)[0].imag)[::-1]
    inv = np.sort(hippo.s4d_inv(64)[0].imag)[::-1]
    np.testing.assert_allclose(inv[:2], legs[:2], rtol=0.05)


@pytest.mark.parametrize("make", [hippo.dplr_legs, hippo.s4d_legs, hippo.s4d_lin, hippo.s4d_inv])
@pytest.mark.parametrize("N", [-2, 0, 1, 7])
def test_state_size_must_be_even_and_positive(make, N):
    with pytest.raises(ValueError, match=f"state_size must be even and at least 2 .* got {N}"):
        make(N)
