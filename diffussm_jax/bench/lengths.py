"""`bench lengths`: time and memory of backbones against the number of positions, and the lengths at which they cross.

A length L is the number of positions of a square latent with 4 channels, L = H W. DiT with P x P patches has L / P^2
tokens, DiffuSSM L / M in its residual stream and L in its SSM. Timed is one block, forward with all gradients, and the
time is multiplied by the model's depth: what comes before and after the blocks is left out. A network that does not
repeat one kind of block is timed whole. At each length the models take turns, so that slow moments of the machine
affect all of them; the median counts.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from importlib import metadata

from ml_collections import ConfigDict

from diffussm_jax import registry
from diffussm_jax.bench.block import measured_part, part_functions
from diffussm_jax.bench.configs import check_fits, memory_problem, split_changes
from diffussm_jax.bench.crossings import crossings, never_crossing
from diffussm_jax.bench.measure import compile_program, machine_name, median_seconds, memory_limit
from diffussm_jax.config import override, paper_config

MODELS = ("diffussm:S", "dit:S/1", "dit:S/2")
LENGTHS = (256, 1024, 4096, 16_384)
_DOWNSAMPLING = 8  # of the latents of `paper_config`
_PACKAGES = ("jax", "jaxlib", "flax")


def length_config(
    text: str, length: int, *, batch_size: int = 1, dtype: str = "float32", changes: Mapping[str, object] | None = None
) -> tuple[str, ConfigDict]:
    """The name and the config of a model at a length.

    Args:
      text: "MODEL:SIZE", names of the registry and of its sizes, such as "dit:S/2"; options of the model may follow,
        "diffussm:S+mixer.method=fft".
      length: a square number.
      batch_size: images.
      dtype: of the model.
      changes: of the config, under dotted keys.

    Raises:
      ValueError: the model, its size or an option is unknown, or the length is not a square number.
    """
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(f"--lengths are numbers of positions of a square latent, such as 256 or 1024; got {length}")
    name, options = split_changes(text)
    model, colon, size = name.partition(":")
    if not colon:
        raise ValueError(f"--models are MODEL:SIZE, such as {', '.join(MODELS)}; got {text!r}")
    config = paper_config(size, image_size=_DOWNSAMPLING * side, num_classes=1000, model=model)
    config.batch_size, config.model.dtype = batch_size, dtype
    config = override(config, {f"model.{key}": value for key, value in options.items()} | dict(changes or {}))
    component = registry.component("model", model)
    return f"{getattr(component, '__name__', model)}-{size}{text[len(name) :]}", config


def bench_lengths(
    configs: Mapping[str, ConfigDict], *, repeats: int = 3
) -> tuple[list[dict[str, str | int | float]], dict[str, str]]:
    """Times models at one length, in turns.

    Args:
      configs: by name, with the same resolution (`length_config`).
      repeats: timed repetitions of each program.

    Returns:
      A row for each model: name, length, tokens (of the residual stream of a block; 0 for a whole network), ms (an
      image, forward with all gradients, all blocks), forward_ms, and memory_mb (that XLA plans for the program with
      gradients of one block, or of a whole network, with the batch). And by the names of the models that do not fit in
      memory, why.

    Raises:
      ValueError: a model cannot take inputs of this length.
    """
    programs, rows, left_out = {}, {}, {}
    for name, config in configs.items():
        part = measured_part(config)
        try:
            arguments, memory = part.random_arguments(config.seed), []
            for column, function, of in zip(
                ("forward_ms", "ms"), part_functions(part), (arguments[:-1], arguments), strict=True
            ):
                compiled, costs = compile_program(function, *of)
                check_fits(f"the {part.name}", costs.memory_bytes, memory_limit())
                memory.append(costs.memory_bytes)
                programs[name, column] = functools.partial(compiled, *of)
        except (ValueError, RuntimeError) as error:
            if (problem := memory_problem(error)) is None:
                raise
            programs = {key: program for key, program in programs.items() if key[0] != name}
            left_out[name] = problem
            continue
        tokens, length = (
            (part.inputs[0].shape[1] if part.name == "block" else 0),
            (config.data.image_size // config.data.downsampling) ** 2,
        )
        scale = 1e3 * part.turns / config.batch_size  # from seconds of the program
        rows[name] = {"name": name, "length": length, "tokens": tokens, "ms": scale, "forward_ms": scale}
        rows[name]["memory_mb"] = memory[-1] / 1e6
    for (name, column), time in median_seconds(programs, repeats).items():
        rows[name][column] *= time
    return list(rows.values()), left_out


def print_lengths(
    models: Sequence[str], lengths: Sequence[int], *, json_file: str | None = None, repeats: int = 3, **options
) -> list[dict]:
    """Prints a table of `bench_lengths` and the crossings, and writes a JSON file after each length.

    Args:
      models: as for `length_config`.
      lengths: numbers of positions.
      json_file: with machine, versions (of packages), options, rows and the crossings of "ms".
      repeats: timed repetitions.
      options: of `length_config`.

    Returns:
      The rows of all lengths.
    """
    configs = {length: dict(length_config(text, length, **options) for text in models) for length in sorted(lengths)}
    print(f"{machine_name()}; medians of {repeats}: all blocks, an image; memory planned for the gradients of a block")
    print(f"{'positions':>9} {'model':>24} {'tokens':>7} {'forward':>12} {'+ gradients':>12} {'memory':>10}")
    rows: list[dict] = []
    for length, of_length in configs.items():
        found, left_out = bench_lengths(of_length, repeats=repeats)
        for row in found:
            print(
                f"{length:9} {row['name']:>24} {row['tokens'] or '-':>7} {row['forward_ms']:9.1f} ms "
                f"{row['ms']:9.1f} ms {row['memory_mb']:7.0f} MB",
                flush=True,
            )
        for name, problem in left_out.items():
            print(f"{length:9} {name:>24} left out: {problem}", flush=True)
        rows += found
        if json_file:
            _write(json_file, rows, {"models": models, "repeats": repeats, **options})
    of_blocks = [row for row in rows if row["tokens"]]  # the memory of a whole network is not comparable with a block's
    for column, what, of in (
        ("forward_ms", "forward", rows),
        ("ms", "+ gradients", rows),
        ("memory_mb", "memory", of_blocks),
    ):
        for crossing in crossings(of, column):
            print(f"{what}: {crossing.above} is cheaper than {crossing.below} beyond {crossing.length:.0f} positions")
        for name, other in never_crossing(of, column):
            print(f"{what}: {name} is cheaper than {other} at every length")
    return rows


def _write(path: str, rows: list[dict], options: Mapping) -> None:
    values = {
        "machine": machine_name(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "options": options,
        "rows": rows,
        "crossings": [crossing._asdict() for crossing in crossings(rows)],
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
