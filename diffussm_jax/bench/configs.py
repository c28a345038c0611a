"""The configs that `bench block`, `step` and `sample` measure: a file's, or the paper's at each size and resolution."""

import ast
from collections.abc import Iterator, Mapping, Sequence

import jax
from ml_collections import ConfigDict

from diffussm_jax.build import input_shape
from diffussm_jax.config import DIFFUSSM_SIZES, flatten, load_config, paper_config
from diffussm_jax.plan import DoesNotFitError, changed

IMAGE_SIZES = (256, 512, 1024, 2048)
# Images of a device at 256 pixels; fewer at higher resolutions, so that there are as many positions.
_BATCH_SIZE = {"cpu": 1}
_LARGE_BATCH_SIZE = 64


def bench_configs(
    sizes: Sequence[str],
    image_sizes: Sequence[int],
    *,
    file: str | None = None,
    changes: Mapping[str, object] | None = None,
    batch_size: int | None = None,
) -> Iterator[ConfigDict]:
    """The config of a file, or the paper's for every size at every resolution.

    Args:
      sizes: "S", "L", "XL", or a width, with 12 blocks.
      image_sizes: pixels; latents have an eighth of them.
      file: of configs/, as for --config; then neither sizes nor image_sizes count.
      changes: other values, under dotted keys.
      batch_size: over all devices; by default the file's, or such that each device has about as many positions.

    Raises:
      ValueError: a size or a key is unknown.
    """
    if file is not None:
        config = load_config(file)
        yield _changed(config, dict(changes or {}) | ({"batch_size": batch_size} if batch_size else {}))
        return
    for size in sizes:
        if size not in DIFFUSSM_SIZES and not size.isdecimal():
            raise ValueError(f"--sizes are {', '.join(DIFFUSSM_SIZES)} or widths such as 64; got {size!r}")
        for image_size in image_sizes:
            config = paper_config("S" if size.isdecimal() else size, image_size=image_size, num_classes=1000)
            if size.isdecimal():
                config.model.width = int(size)
            on_a_device = _BATCH_SIZE.get(jax.default_backend(), _LARGE_BATCH_SIZE) * 256**2 // image_size**2
            config.batch_size = batch_size or max(1, on_a_device) * jax.device_count()
            yield _changed(config, changes or {})


def _changed(config: ConfigDict, changes: Mapping[str, object]) -> ConfigDict:
    unknown = sorted(changes.keys() - flatten(config).keys())
    if unknown:
        raise ValueError(f"unknown config keys {unknown}; known are {sorted(flatten(config))}")
    return changed(config, dict(changes))


def parse_changes(items: Sequence[str]) -> dict[str, object]:
    """["model.depth=2", "model.remat=dots"] to values under dotted keys; ValueError for what is not KEY=VALUE."""
    values: dict[str, object] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE, such as model.depth=2; got {item!r}")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = text
    return values


def describe(config: ConfigDict) -> dict[str, str | int]:
    """The values of a config that decide on speed, under short names."""
    H, W, _ = input_shape(config)
    return {
        "image_size": config.data.image_size,
        "L": H * W,
        "width": config.model.width,
        "depth": config.model.depth,
        "batch_size": config.batch_size,
        "dtype": config.model.dtype,
        "remat": config.model.remat,
        "ssm_method": config.model.ssm_method,
    }


def memory_problem(error: Exception) -> str | None:
    """What an error says of a lack of memory; None if it is another error."""
    if isinstance(error, DoesNotFitError) or "RESOURCE_EXHAUSTED" in str(error):
        return f"does not fit: {str(error).splitlines()[0]}"
    return None


def print_rows(configs: Sequence[ConfigDict], bench, columns: Mapping[str, str]) -> list[dict]:
    """Prints a line for each config, also where it does not fit the memory, and returns the rows of those that do.

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
        known = [f"{key} {figures[key]:{spec}}" for key, spec in columns.items() if figures[key] is not None]
        print(f"{name}: {', '.join(known)}", flush=True)
    return rows
