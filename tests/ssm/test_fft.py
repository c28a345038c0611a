"""The lengths of transforms: long enough for a linear convolution, quick to transform, and apart in a CPU's cache."""

import pytest

from diffussm_jax.ssm.fft import transform_length

LENGTHS = [*range(1, 400), *range(400, 70_000, 997), *(2**k for k in range(9, 18))]


def largest_prime(n):
    p = 2
    while p * p <= n:
        n, p = (n // p, p) if n % p == 0 else (n, p + 1)
    return n


@pytest.mark.parametrize(("platform", "primes"), [("cpu", 11), ("gpu", 5), ("tpu", 5)])
def test_long_enough_and_a_product_of_small_primes(platform, primes):
    for L in LENGTHS:
        n = transform_length(L, platform)
        assert n >= 2 * L - 1 and largest_prime(n) <= primes, (L, n)


def test_on_cpus_rows_do_not_share_lines_of_the_cache():
    for L in LENGTHS:
        n = transform_length(L, "cpu")
        assert n % 16 == 0 and n % 512, (L, n)
        assert n <= 1.15 * 2 * L + 16, (L, n)
