"""Measures the speed of the SSM's methods side by side, in one run on this machine.

    python -m diffussm_jax.bench ssm
    python -m diffussm_jax.bench ssm --shapes=4x1024x384x64,2x4096x384x64 --methods=fft,chunked,fft_naive

Each shape is B x L x D x N. Times are of the bidirectional SSM, jitted: the forward pass, and the forward pass with
the gradients of the input and of every parameter. The repetitions of all methods take turns, so that a slow moment of
the machine falls on all of them; the median counts. `fft_naive` is the yardstick that public code uses: an FFT for
each direction, with the kernel summed from the full [D, N/2, L] Vandermonde array.
"""

import csv
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import flags

from diffussm_jax import cli
from diffussm_jax.ssm import METHODS, SSMParams, init_s4d, ssm_apply_bidirectional, to_complex, zoh

_SHAPES = flags.DEFINE_list("shapes", ["4x256x384x64", "4x1024x384x64"], "Shapes B x L x D x N, with x between.")
_METHODS = flags.DEFINE_list(
    "methods", ["fft_naive", "fft", "chunked", "associative", "recurrent"], "Methods to time; ratios are to the first."
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed repetitions, after one that is not.", lower_bound=1)
_CSV = flags.DEFINE_string("csv", None, "A file to write the figures to, too.")

NAIVE = "fft_naive"
_COLUMNS = ("B", "L", "D", "N", "method", "forward_ms", "gradient_ms", "speedup_forward", "speedup_gradient")


def fft_naive(forward: SSMParams, backward: SSMParams, u: jax.Array) -> jax.Array:
    """The bidirectional SSM as public code computes it: [B, L, D] -> [B, L, 2D]. Only a yardstick."""
    L = u.shape[1]

    def one_direction(params, u):
        Lambda_bar, B_bar = zoh(params.Lambda, params.B, params.dt)
        vandermonde = jnp.exp(jnp.log(Lambda_bar)[..., None] * jnp.arange(L))
        kernel = 2 * jnp.einsum("dn,dnl->dl", params.C * B_bar, vandermonde).real
        u = u.swapaxes(1, 2)
        y = jnp.fft.irfft(jnp.fft.rfft(u, 2 * L) * jnp.fft.rfft(kernel, 2 * L), 2 * L)[..., :L]
        return (y + params.D[:, None] * u).swapaxes(1, 2)

    return jnp.concatenate([one_direction(forward, u), jnp.flip(one_direction(backward, jnp.flip(u, 1)), 1)], -1)


def _method(name: str) -> Callable[[SSMParams, SSMParams, jax.Array], jax.Array]:
    if name == NAIVE:
        return fft_naive
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose from {', '.join([NAIVE, *METHODS])}")
    return lambda forward, backward, u: ssm_apply_bidirectional(forward, backward, u, method=name)


def _programs(name: str) -> tuple[Callable, Callable]:
    """Jitted (real forward, real backward, u, cotangent) -> the output, and -> loss and gradients of the others."""
    method = _method(name)

    def forward_pass(forward, backward, u, cotangent):
        return method(to_complex(forward), to_complex(backward), u)

    def loss(forward, backward, u, cotangent):
        return jnp.sum(forward_pass(forward, backward, u, cotangent) * cotangent)

    return jax.jit(forward_pass), jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def _seconds(program: Callable, arguments: tuple) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start


def bench_ssm(
    shape: tuple[int, int, int, int], methods: list[str], *, repeats: int = 5
) -> list[dict[str, str | int | float]]:
    """Times methods at one shape, in turns.

    Args:
      shape: B, L, D, N.
      methods: names of `ssm.METHODS`, or "fft_naive".
      repeats: timed repetitions.

    Returns:
      A row a method: its shape and name, median milliseconds of the forward pass and of forward with all gradients,
      and how many times faster than the first method it is.

    Raises:
      ValueError: a method is unknown.
    """
    B, L, D, N = shape
    keys = jax.random.split(jax.random.key(0), 4)
    arguments = (
        init_s4d(keys[0], D, N),
        init_s4d(keys[1], D, N),
        jax.random.normal(keys[2], (B, L, D)),
        jax.random.normal(keys[3], (B, L, 2 * D)),
    )
    programs = {(name, i): program for name in methods for i, program in enumerate(_programs(name))}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in programs}
    for repeat in range(repeats + 1):
        for key, program in programs.items():
            seconds = _seconds(program, arguments)
            if repeat:  # the first compiles
                times[key].append(seconds)
    median = {key: statistics.median(seconds) for key, seconds in times.items()}
    return [
        dict(
            zip(
                _COLUMNS,
                (
                    *shape,
                    name,
                    1e3 * median[name, 0],
                    1e3 * median[name, 1],
                    median[methods[0], 0] / median[name, 0],
                    median[methods[0], 1] / median[name, 1],
                ),
                strict=True,
            )
        )
        for name in methods
    ]


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """4x1024x384x64 to (4, 1024, 384, 64); ValueError for anything else."""
    parts = text.strip().split("x")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"a shape is B x L x D x N, such as 4x1024x384x64; got {text!r}")
    return tuple(int(part) for part in parts)


def main(what: str) -> int:
    """Prints the table; returns the exit code."""
    if what != "ssm":
        raise ValueError(f"unknown benchmark {what!r}; choose ssm")
    shapes = [parse_shape(text) for text in _SHAPES.value]
    for name in _METHODS.value:
        _method(name)
    cli.keep_freed_memory()
    devices, first = jax.devices(), _METHODS.value[0]
    print(
        f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}, milliseconds, medians of {_REPEATS.value}"
    )
    print(f"{'B x L x D x N':>20} {'method':>12} {'forward':>10} {'+ gradients':>12}   times as fast as {first}")
    rows = []
    for shape in shapes:
        for row in bench_ssm(shape, _METHODS.value, repeats=_REPEATS.value):
            rows.append(row)
            times = f"{row['forward_ms']:10.1f} {row['gradient_ms']:12.1f}"
            ratios = f"{row['speedup_forward']:.2f} and {row['speedup_gradient']:.2f}"
            print(f"{'x'.join(map(str, shape)):>20} {row['method']:>12} {times}   {ratios}", flush=True)
    if _CSV.value:
        with open(_CSV.value, "w", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    cli.run(main, num_arguments=1)
