"""The configs that `bench block`, `step` and `sample` measure: files, or the paper's at each size and resolution."""

import ast
from collections.abc import Iterator, Mapping, Sequence

import jax
from ml_collections import ConfigDict

from diffussm_jax.build import Parts
from diffussm_jax.config import load_config, override, paper_config
from diffussm_jax.models import DIFFUSSM_SIZES
from diffussm_jax.options import flatten
from diffussm_jax.plan import DoesNotFitError

IMAGE_SIZES = (256, 512, 1024, 2048)
# Images per device at 256 pixels. At other resolutions a device has the same number of positions.
_BATCH_SIZE = {"cpu": 1}
_LARGE_BATCH_SIZE = 64
# Columns of a row, and the keys of `config.model` that they show; a model without such a key has no such column.
_MODEL_COLUMNS = {
    "model": "name",
    "patch_size": "patch_size",
    "width": "width",
    "depth": "depth",
    "dtype": "dtype",
    "remat": "remat",
    "ssm_method": "mixer.method",
}


def bench_configs(
    sizes: Sequence[str],
    image_sizes: Sequence[int],
    *,
    files: Sequence[str] = (),
    changes: Mapping[str, object] | None = None,
    batch_size: int | None = None,
) -> Iterator[ConfigDict]:
    """The configs of files, or the paper's for every size at every resolution.

    Args:
      sizes: names of `DIFFUSSM_SIZES`, or widths of models with 12 blocks.
      image_sizes: pixels; latents have an eighth of them.
      files: of configs/, as for --config; sizes and image_sizes have no effect then.
      changes: other values, under dotted keys (`config.override`).
      batch_size: over all devices; by default that of a file, or about the same number of positions per device.

    Raises:
      ValueError: a size, a key or a component is unknown.
    """
    changes = dict(changes or {})
    if files:
        for file in files:
            yield override(load_config(file), changes | ({"batch_size": batch_size} if batch_size else {}))
        return
    for size in sizes:
        if size not in DIFFUSSM_SIZES and not size.isdecimal():
            raise ValueError(f"--sizes are {', '.join(DIFFUSSM_SIZES)} or widths such as 64; got {size!r}")
        for image_size in image_sizes:
            config = paper_config("S" if size.isdecimal() else size, image_size=image_size, num_classes=1000)
            if size.isdecimal():
                config.model.width = int(size)
            per_device = _BATCH_SIZE.get(jax.default_backend(), _LARGE_BATCH_SIZE) * 256**2 // image_size**2
            config.batch_size = batch_size or max(1, per_device) * jax.device_count()
            yield override(config, changes)


def parse_changes(items: Sequence[str]) -> dict[str, object]:
    """["model.depth=2", "model.remat=dots"] to values under dotted keys; ValueError if an item is not KEY=VALUE."""
    values: dict[str, object] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"a change is KEY=VALUE, such as model.depth=2; got {item!r}")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = text
    return values


def split_changes(text: str) -> tuple[str, dict[str, object]]:
    """s4d+method=fft+state_size=16 to ("s4d", {"method": "fft", "state_size": 16}); ValueError as `parse_changes`."""
    name, *changes = text.split("+")
    return name, parse_changes(changes)


def describe(config: ConfigDict) -> dict[str, str | int]:
    """The values of a config that decide on speed, under short names."""
    H, W, _ = Parts(config).input_shape
    values = {"image_size": config.data.image_size, "L": H * W, "batch_size": config.batch_size}
    model = flatten(config.model)
    return values | {name: model[key] for name, key in _MODEL_COLUMNS.items() if key in model}


def check_fits(what: str, needed: int, available: int) -> None:
    """Raises DoesNotFitError if a program needs more bytes than a device has."""
    if needed > available:
        raise DoesNotFitError(f"{what} needs {needed / 1e9:.1f} GB of a device, there are {available / 1e9:.1f}")


def memory_problem(error: Exception) -> str | None:
    """The first line of an error about memory; None for another error."""
    if isinstance(error, DoesNotFitError) or "RESOURCE_EXHAUSTED" in str(error):
        return f"does not fit: {str(error).splitlines()[0]}"
    return None


def print_rows(configs: Sequence[ConfigDict], bench, columns: Mapping[str, str]) -> list[dict]:
    """Prints a line for each config, and returns the rows of those that fit the memory.

    Args:
      configs: to measure.
      bench: config -> figures by name.
      columns: the figures to print, with their formats.
    """
    rows: list[dict] = []
    for config in configs:
        values = describe(config)
        name = " ".join(f"{key} {value}" for key, value in values.items())
        try:
            figures = bench(config)
        except (ValueError, RuntimeError) as error:
            problem = memory_problem(error)
            if problem is None:
                raise
            print(f"{name}: {problem}", flush=True)
            continue
        rows.append(values | figures)
        known = [f"{key} {figures[key]:{spec}}" for key, spec in columns.items() if figures.get(key) is not None]
        print(f"{name}: {', '.join(known)}", flush=True)
    return rows
