"""Measures speed on this machine: the SSM's methods side by side in one run, the reading of latents, the VAE.

    python -m diffussm_jax.bench ssm
    python -m diffussm_jax.bench ssm --shapes=4x1024x384x64,2x4096x384x64 --methods=fft,chunked,fft_naive
    python -m diffussm_jax.bench loader --data=latents/imagenet256
    python -m diffussm_jax.bench vae --image_sizes=256,512,1024

ssm: each shape is B x L x D x N. Times are of the bidirectional SSM, jitted: the forward pass, and the forward pass
with the gradients of the input and of every parameter. The repetitions of all methods take turns, so that a slow
moment of the machine falls on all of them; the median counts. `fft_naive` is the yardstick that public code uses: an
FFT for each direction, with the kernel summed from the full [D, N/2, L] Vandermonde array.

loader: records a second of a data set that precompute wrote, read in training's shuffled order into batches, once
they are in the system's file cache. `taskset -c 0` before the command holds it to one core.

vae: encoding and decoding one image by the full-size autoencoder (random weights), whole and, where the image is larger
than one, by tiles of 512 pixels; seconds, and the memory that XLA plans for: parameters, in- and outputs, temporaries.
"""

import csv
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import flags

from diffussm_jax import cli
from diffussm_jax.autoencoder import AutoencoderKL, init_params, tiled_decode, tiled_encode
from diffussm_jax.data.latents import Latents
from diffussm_jax.data.loader import Loader
from diffussm_jax.ssm import METHODS, SSMParams, init_s4d, ssm_apply_bidirectional, to_complex, zoh

_FLAGS = flags.FlagValues()  # apart, so that any of the programs can be imported beside another
_SHAPES = flags.DEFINE_list(
    "shapes", ["4x256x384x64", "4x1024x384x64"], "Shapes B x L x D x N, with x between.", flag_values=_FLAGS
)
_METHODS = flags.DEFINE_list(
    "methods",
    ["fft_naive", "fft", "chunked", "associative", "recurrent"],
    "Methods to time; ratios are to the first.",
    flag_values=_FLAGS,
)
_REPEATS = flags.DEFINE_integer(
    "repeats", 5, "Timed repetitions, after one that is not.", lower_bound=1, flag_values=_FLAGS
)
_IMAGE_SIZES = flags.DEFINE_list("image_sizes", ["256", "512"], "vae: pixels.", flag_values=_FLAGS)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "vae: of its layers.", flag_values=_FLAGS)
_DATA = flags.DEFINE_string("data", None, "loader: a folder of latents.", flag_values=_FLAGS)
_SPLIT = flags.DEFINE_string("split", "train", "loader: its split.", flag_values=_FLAGS)
_NUM_THREADS = flags.DEFINE_integer("num_threads", 4, "loader: threads.", lower_bound=1, flag_values=_FLAGS)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "loader: records of a batch.", lower_bound=1, flag_values=_FLAGS)
_CSV = flags.DEFINE_string("csv", None, "A file to write the figures to, too.", flag_values=_FLAGS)

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


def bench_loader(folder: str, split: str, *, batch_size: int = 256, num_threads: int = 4) -> float:
    """Records a second that a `Loader` reads, over a pass (at most 20,000 records) after one that warms the cache."""
    records = Latents(folder, split)
    batches = Loader(records, batch_size, 0, num_threads=num_threads).iterate(0)
    num_batches = max(1, min(len(records), 20_000) // batch_size)
    for _ in range(num_batches):
        next(batches)
    start = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    return num_batches * batch_size / (time.perf_counter() - start)


def bench_vae(image_size: int, *, dtype: str = "float32", is_tiled: bool = False, repeats: int = 3) -> dict:
    """Times the full-size autoencoder of Stable Diffusion on one image, and reads how much memory XLA plans for.

    Args:
      image_size: pixels, a multiple of 8.
      dtype: of its layers.
      is_tiled: by tiles of 512 pixels; else whole.
      repeats: timed repetitions; the median counts.

    Returns:
      encode_s, decode_s, encode_mb, decode_mb. Tiled, the memory is that of a tile's program, the image and the output.
    """
    model = AutoencoderKL(dtype=jnp.dtype(dtype))
    params = init_params(model, 0)
    image = jax.random.uniform(jax.random.key(1), (1, image_size, image_size, 3), minval=-1)
    latents = jax.random.normal(jax.random.key(2), (1, image_size // 8, image_size // 8, 4))
    figures = {}
    for method, x, tiled, tile in (
        ("encode", image, tiled_encode, 512),
        ("decode", latents, tiled_decode, 512 // model.downsampling),
    ):
        part = x[:, :tile, :tile] if is_tiled else x
        whole = jax.jit(lambda params, x, method=method: model.apply({"params": params}, x, method=method))
        compiled = whole.lower(params, part).compile()
        memory = compiled.memory_analysis()
        num_bytes = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        if is_tiled:
            num_bytes += image.nbytes + latents.nbytes
            program, arguments = functools.partial(tiled, model), (params, x)
        else:
            program, arguments = compiled, (params, x)
        times = [_seconds(program, arguments) for _ in range(repeats + 1)][1:]
        figures |= {f"{method}_s": statistics.median(times), f"{method}_mb": num_bytes / 1e6}
    return figures


def _print_vae() -> None:
    sizes = [int(size) for size in _IMAGE_SIZES.value if size.isdecimal() and int(size) and int(size) % 8 == 0]
    if len(sizes) != len(_IMAGE_SIZES.value):
        raise ValueError(f"--image_sizes are multiples of 8, such as 256,512; got {','.join(_IMAGE_SIZES.value)}")
    print(f"one image on 1 {jax.devices()[0].device_kind}, {_DTYPE.value}, jax {jax.__version__}")
    print(f"{'pixels':>10} {'':>6} {'encode, s':>10} {'decode, s':>10} {'encode, MB':>11} {'decode, MB':>11}")
    for size in sizes:
        for is_tiled in (False, True) if size > 512 else (False,):
            f = bench_vae(size, dtype=_DTYPE.value, is_tiled=is_tiled, repeats=_REPEATS.value)
            print(
                f"{size:>10} {'tiled' if is_tiled else 'whole':>6} {f['encode_s']:10.3f} {f['decode_s']:10.3f} "
                f"{f['encode_mb']:11.0f} {f['decode_mb']:11.0f}",
                flush=True,
            )


def main(what: str) -> int:
    """Prints the figures; returns the exit code."""
    if what == "vae":
        cli.keep_freed_memory()
        _print_vae()
        return 0
    if what == "loader":
        if _DATA.value is None:
            raise ValueError("the loader's benchmark needs --data=FOLDER, a folder of latents")
        options = {"batch_size": _BATCH_SIZE.value, "num_threads": _NUM_THREADS.value}
        print(f"{bench_loader(_DATA.value, _SPLIT.value, **options):.0f} records/s")
        return 0
    if what != "ssm":
        raise ValueError(f"unknown benchmark {what!r}; choose ssm, loader or vae")
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
    cli.run(main, _FLAGS, num_arguments=1)
