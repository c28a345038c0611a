"""Measures speed, memory and accuracy of the parts and of whole steps; docs/bench.md explains each figure.

python -m diffussm_jax.bench ssm
python -m diffussm_jax.bench ssm --shapes=4x1024x384x64,2x4096x384x64 --methods=fft_naive,fft,chunked --repeats=9
python -m diffussm_jax.bench ssm --csv=ssm.csv --plot=ssm.png --dtype=bfloat16
python -m diffussm_jax.bench ssm --write_table
python -m diffussm_jax.bench ssm --aot=v5e
python -m diffussm_jax.bench ssm --mixers=all --shapes=4x1024x384
python -m diffussm_jax.bench errors
python -m diffussm_jax.bench block --sizes=S,XL --image_sizes=256
python -m diffussm_jax.bench block --sizes=XL --image_sizes=256 --batch_size=16 --aot=v5e
python -m diffussm_jax.bench block --config=configs/imagenet256.py:XL,configs/dit_imagenet256.py:XL/2 --aot=v5e
python -m diffussm_jax.bench lengths --models=diffussm:S,dit:S/1,dit:S/2 --json=lengths.json
python -m diffussm_jax.bench versus_torch
python -m diffussm_jax.bench step --sizes=XL --image_sizes=256,512 --batch_size=64 --set=model.mixer.method=chunked
python -m diffussm_jax.bench sample --config=configs/digits.py --batch_size=64 --sampler=ddim --steps=50
python -m diffussm_jax.bench loader --data=latents/imagenet256
python -m diffussm_jax.bench vae --image_sizes=256,512,1024
python -m diffussm_jax.bench inception --batch_size=32 --image_sizes=256
python -m diffussm_jax.bench scores --shapes=50000x10000x2048 --methods=float32,adm_float16,numpy,sklearn
"""

import functools
from collections.abc import Callable, Mapping

import jax
from absl import flags
from ml_collections import ConfigDict

from diffussm_jax import cli, registry
from diffussm_jax.bench import aot, block, errors, lengths, mixers, sample, scores, ssm, step, table, versus_torch
from diffussm_jax.bench.configs import IMAGE_SIZES, bench_configs, parse_changes, print_rows
from diffussm_jax.bench.inception import print_inception
from diffussm_jax.bench.loader import bench_loader
from diffussm_jax.bench.measure import machine_name, write_csv
from diffussm_jax.bench.vae import print_vae
from diffussm_jax.io import check_writable
from diffussm_jax.models import DIFFUSSM_SIZES, DiffuSSM
from diffussm_jax.options import options_of

_FLAGS = flags.FlagValues()  # apart, so that any of the programs can be imported beside another
_SHAPES = flags.DEFINE_list(
    "shapes",
    None,
    "ssm, errors: shapes B x L x D x N, such as 4x1024x384x64; default for ssm L = 256 .. 65536. With --mixers: "
    "B x L x D. scores: N x M x d.",
    flag_values=_FLAGS,
)
_METHODS = flags.DEFINE_list(
    "methods",
    None,
    "ssm, errors, scores: methods; ratios are to the first. By default all that run here.",
    flag_values=_FLAGS,
)
_MIXERS = flags.DEFINE_list(
    "mixers",
    None,
    "ssm: whole mixers in place of methods, such as s4d,attention or s4d+method=fft; all: every mixer.",
    flag_values=_FLAGS,
)
_REPEATS = flags.DEFINE_integer(
    "repeats", 5, "Timed repetitions, after one that is not timed.", lower_bound=1, flag_values=_FLAGS
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    list(options_of(DiffuSSM)["dtype"].choices.names),
    "ssm, lengths, vae: float32 by default, bfloat16 with --aot; errors: both by default.",
    flag_values=_FLAGS,
)
_AOT = flags.DEFINE_string(
    "aot", None, "ssm, block: compile ahead of time for a chip, such as v5e, v6e-1 or h100.", flag_values=_FLAGS
)
_LITTLE_EFFORT = flags.DEFINE_boolean(
    "little_effort",
    False,
    "block: with --aot, whether to compile without optimizing the program's speed, in a tenth of the time.",
    flag_values=_FLAGS,
)
_PLOT = flags.DEFINE_string("plot", None, "ssm: a PNG of time against L.", flag_values=_FLAGS)
_WRITE_TABLE = flags.DEFINE_flag(
    flags.Flag(
        flags.ArgumentParser(),
        flags.ArgumentSerializer(),
        "write_table",
        None,
        'ssm: writes the table from which "auto" chooses, to FILE or into the package.',
        boolean=True,  # may have no value; the value is then "true"
    ),
    flag_values=_FLAGS,
)
_SIZES = flags.DEFINE_list(
    "sizes",
    list(DIFFUSSM_SIZES),
    f"block, step, sample: {', '.join(DIFFUSSM_SIZES)} or widths.",
    short_name="size",
    flag_values=_FLAGS,
)
_IMAGE_SIZES = flags.DEFINE_list(
    "image_sizes", None, "block, step, sample, vae, inception: pixels.", flag_values=_FLAGS
)
_CONFIG = flags.DEFINE_list(
    "config", [], "block, step, sample: files of configs/ in place of sizes.", flag_values=_FLAGS
)
_MODELS = flags.DEFINE_list(
    "models",
    None,
    f"lengths: MODEL:SIZE, such as {','.join(lengths.MODELS)}, with options as diffussm:S+mixer.method=fft; "
    f"versus_torch: {', '.join(versus_torch.MODELS)}.",
    flag_values=_FLAGS,
)
_LENGTHS = flags.DEFINE_list(
    "lengths", list(map(str, lengths.LENGTHS)), "lengths: positions of square latents.", flag_values=_FLAGS
)
_SET = flags.DEFINE_list(
    "set",
    [],
    "block, step, sample, lengths: values of the config, model.depth=2,model.mixer.method=fft.",
    flag_values=_FLAGS,
)
_SAMPLER = flags.DEFINE_enum("sampler", None, registry.names("sampler"), "sample: the sampler.", flag_values=_FLAGS)
_STEPS = flags.DEFINE_integer("steps", None, "sample: its steps.", lower_bound=1, flag_values=_FLAGS)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    None,
    "block, step, sample, lengths, versus_torch, loader, inception: images at a time.",
    lower_bound=1,
    flag_values=_FLAGS,
)
_DATA = flags.DEFINE_string("data", None, "loader: a folder of latents.", flag_values=_FLAGS)
_SPLIT = flags.DEFINE_string("split", "train", "loader: its split.", flag_values=_FLAGS)
_NUM_THREADS = flags.DEFINE_integer("num_threads", 4, "loader: threads.", lower_bound=1, flag_values=_FLAGS)
_JSON = flags.DEFINE_string("json", None, "lengths: a file to write the figures to.", flag_values=_FLAGS)
_CSV = flags.DEFINE_string("csv", None, "A file to write the figures to as well.", flag_values=_FLAGS)


def _shapes() -> list[ssm.Shape] | None:
    return [ssm.parse_shape(text) for text in _SHAPES.value] if _SHAPES.value else None


def _mixers() -> list[dict]:
    if others := [flag.name for flag in (_METHODS, _AOT, _PLOT, _WRITE_TABLE) if flag.value is not None]:
        raise ValueError(f"--mixers are timed only; leave out --{', --'.join(others)}")
    names = registry.names("mixer") if _MIXERS.value == ["all"] else _MIXERS.value
    shapes = [mixers.parse_shape(text) for text in _SHAPES.value or []]
    cli.keep_freed_memory()
    options = {"dtype": _DTYPE.value or "float32", "repeats": _REPEATS.value}
    return mixers.print_mixers(shapes or [mixers.DEFAULT_SHAPE], names, **options)


def _ssm() -> list[dict]:
    if _MIXERS.value:
        return _mixers()
    shapes = _shapes()
    if _AOT.value is not None:
        dtype = _DTYPE.value or aot.DEFAULT_DTYPE
        methods = _METHODS.value or ssm.default_methods()
        return aot.print_aot(_AOT.value, shapes or [aot.DEFAULT_SHAPE], methods, dtype=dtype)
    is_for_table = _WRITE_TABLE.value not in (None, "false")
    cli.keep_freed_memory()
    options = {"dtype": _DTYPE.value or "float32", "repeats": _REPEATS.value}
    if is_for_table:
        path = table.TABLE if _WRITE_TABLE.value == "true" else _WRITE_TABLE.value
        methods = _METHODS.value or ssm.own_methods()
        rows = table.print_table(path, shapes or table.table_shapes(), methods, **options)
    else:
        rows = ssm.print_ssm(shapes or ssm.default_shapes(), _METHODS.value or ssm.default_methods(), **options)
    if _PLOT.value:
        ssm.plot(rows, _PLOT.value)
    return rows


def _errors() -> list[dict]:
    dtypes = [_DTYPE.value] if _DTYPE.value else list(errors.BARS)
    methods = _METHODS.value or ssm.own_methods()
    return errors.print_errors(_shapes() or errors.DEFAULT_SHAPES, methods, dtypes=dtypes)


def _image_sizes(default: tuple[int, ...]) -> list[int]:
    texts = _IMAGE_SIZES.value or [str(size) for size in default]
    if not all(text.isdecimal() and int(text) for text in texts):
        raise ValueError(f"--image_sizes are pixels, such as 256,512; got {','.join(texts)}")
    return [int(text) for text in texts]


def _of_configs(bench: Callable[[ConfigDict], dict], columns: Mapping[str, str], title: str) -> list[dict]:
    """Rows of a benchmark that takes a config."""
    changes = parse_changes(_SET.value)
    if _SAMPLER.value:
        changes["sampling.sampler"] = _SAMPLER.value
    if _STEPS.value:
        changes["sampling.num_steps"] = _STEPS.value
    sizes = {"files": _CONFIG.value, "changes": changes, "batch_size": _BATCH_SIZE.value}
    configs = list(bench_configs(_SIZES.value, _image_sizes(IMAGE_SIZES), **sizes))
    cli.keep_freed_memory()
    print(title)
    return print_rows(configs, bench, columns)


def _timed(module, bench) -> list[dict]:
    title = f"{machine_name()}; medians of {_REPEATS.value}"
    return _of_configs(functools.partial(bench, repeats=_REPEATS.value), module.COLUMNS, title)


def _block() -> list[dict]:
    if _AOT.value is None:
        return _timed(block, block.bench_block)
    machine = aot.one_chip(_AOT.value)
    title = f"compiled for 1 {machine.chip.device_kinds[0]}, not run; the bodies of loops are counted once"
    count = functools.partial(block.count_block, machine=machine, has_full_effort=not _LITTLE_EFFORT.value)
    return _of_configs(count, block.AOT_COLUMNS, title)


def _lengths() -> list[dict]:
    if not all(text.isdecimal() and int(text) for text in _LENGTHS.value):
        raise ValueError(f"--lengths are numbers of positions, such as 256,1024; got {','.join(_LENGTHS.value)}")
    cli.keep_freed_memory()
    return lengths.print_lengths(
        _MODELS.value or lengths.MODELS,
        [int(text) for text in _LENGTHS.value],
        json_file=_JSON.value,
        repeats=_REPEATS.value,
        batch_size=_BATCH_SIZE.value or 1,
        dtype=_DTYPE.value or "float32",
        changes=parse_changes(_SET.value),
    )


def _versus_torch() -> list[dict]:
    cli.keep_freed_memory()
    names = _MODELS.value or list(versus_torch.MODELS)
    return versus_torch.print_versus_torch(names, batch_size=_BATCH_SIZE.value or 4, repeats=_REPEATS.value)


def _step() -> list[dict]:
    print("MFU: 3 * 2 * multiply-adds of the forward's linear layers * images/s / peak bfloat16; the SSM excluded")
    return _timed(step, step.bench_step)


def _sample() -> list[dict]:
    return _timed(sample, sample.bench_sample)


def _loader() -> list[dict]:
    if _DATA.value is None:
        raise ValueError("the loader's benchmark needs --data=FOLDER, a folder of latents")
    options = {"batch_size": _BATCH_SIZE.value or 256, "num_threads": _NUM_THREADS.value}
    print(f"{bench_loader(_DATA.value, _SPLIT.value, **options):.0f} records/s")
    return []


def _vae() -> list[dict]:
    cli.keep_freed_memory()
    print_vae(_image_sizes((256, 512)), dtype=_DTYPE.value or "float32", repeats=_REPEATS.value)
    return []


def _inception() -> list[dict]:
    cli.keep_freed_memory()
    options = {"batch_size": _BATCH_SIZE.value or 32, "repeats": _REPEATS.value}
    return [row for size in _image_sizes((256,)) for row in print_inception(image_size=size, **options)]


def _scores() -> list[dict]:
    shapes = [scores.parse_shape(text) for text in _SHAPES.value or []]
    return scores.print_scores(shapes or [scores.DEFAULT_SHAPE], _METHODS.value or list(scores.METHODS))


_BENCHMARKS: dict[str, Callable[[], list[dict]]] = {
    "ssm": _ssm,
    "errors": _errors,
    "block": _block,
    "lengths": _lengths,
    "versus_torch": _versus_torch,
    "step": _step,
    "sample": _sample,
    "loader": _loader,
    "vae": _vae,
    "inception": _inception,
    "scores": _scores,
}


def main(what: str) -> int:
    """Prints the figures; returns the exit code."""
    if what not in _BENCHMARKS:
        raise ValueError(f"unknown benchmark {what!r}; choose one of {', '.join(_BENCHMARKS)}")
    for path in (_CSV.value, _PLOT.value, _JSON.value):
        if path is not None:
            check_writable(path)
    if _AOT.value is not None:
        jax.config.update("jax_platforms", "cpu")  # leaves this computer's accelerator free
    rows = _BENCHMARKS[what]()
    if _CSV.value and rows:
        write_csv(_CSV.value, rows)
    return int(not all(row.get("passed", True) for row in rows))


if __name__ == "__main__":
    cli.run(main, _FLAGS, num_arguments=1)
