"""Any value of a key or a flag is taken or refused at once, by a message that names it."""

import contextlib
import json
import math
import random
import re
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from programs import run_program

from diffussm_jax import export, main, precompute, precompute_job, sample
from diffussm_jax.autoencoder import AutoencoderKL
from diffussm_jax.bench import __main__ as bench
from diffussm_jax.compare import __main__ as compare
from diffussm_jax.config import default_config, from_plain, override, to_plain
from diffussm_jax.options import flatten
from diffussm_jax.validation import known_options, validate

NUMBERS = [math.nan, math.inf, -math.inf, -1, -0.5, 0, 10**12, 2**64, -(2**64), 10**400, 1e308, 5e-324, 1.5]
TEXTS = ["", "ü\n", "../..", "None", "nan", "inf", "1e400", "0x10", "1_0", "٣", "(1", "\udcff", "x" * 5000]
OTHERS = [True, False, None, b"x", object, (), (1, 2), ("a",), (math.nan, 1.0), [], [1], {}, {"a": 1}, "\0"]
LIMITS = {int: 2**63 - 1, float: float(np.finfo(np.float32).max)}
GROUPS = ["hooks", "hooks.a", "hooks.a.name", "conditioners.a.name", "model.mixer"]
FLOW = {"schedule": "rectified_flow", "target": "velocity", "has_learned_variance": False}
BASES = [
    {},
    {f"diffusion.{key}": value for key, value in FLOW.items()},
    {"sampling.sampler": "ddim", "optimizer.decay": "cosine"},
    {"data.source": "latents", "data.downsampling": 8, "data.image_size": 64},
]


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def watched(wrong, what, seconds):
    """Adds to `wrong` what the body raises, and whether it takes long or much memory."""
    started, before = time.perf_counter(), peak_bytes()
    try:
        yield
        assert time.perf_counter() - started < seconds and peak_bytes() - before < 5e8, "takes long or much memory"
    except Exception as error:
        wrong[what] = repr(error)[:150]


def is_named(key, value, text):
    """Whether a message has the last part of a key, and the value as it came or in the option's type."""
    name, shown = re.split("[.=]", key)[-1], {repr(value), str(value)}
    for kind in (float, tuple):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            shown.add(repr(kind(value)))
    has_value = any(form[:20] in text for form in shown) or value in (True, False, -1)
    return (name in text or name.replace("_", " ") in text) and (has_value or "unknown key" in text)


def check_accepted(config, key, value):
    """Numbers are finite and of their types, and the config is read back as it was saved."""
    options, values = known_options(config), flatten(config)
    assert not isinstance(value, bool) or options[key].type is bool, "a truth value is no number"
    limits = {name: LIMITS[option.type] for name, option in options.items() if option.type in LIMITS}
    assert not [name for name, limit in limits.items() if not abs(values[name]) <= limit], "is too large"
    again = from_plain(json.loads(json.dumps(to_plain(config))))
    validate(again)
    assert flatten(again) == values


@pytest.mark.parametrize("num_cases", [400, pytest.param(4_000, marks=pytest.mark.slow)])
def test_keys(num_cases):
    rng, wrong, bases = random.Random(0), {}, [override(default_config(), base) for base in BASES]
    keys = [[*known_options(base), *GROUPS] for base in bases]
    for _ in range(num_cases):
        base, names = rng.choice(list(zip(bases, keys, strict=True)))
        key, value = rng.choice(names), rng.choice([*NUMBERS, *TEXTS, *OTHERS])
        with watched(wrong, f"{key} = {value!r:.20}", 2):
            try:
                validate(config := override(base, {key: value}))
            except ValueError as error:
                if not is_named(key, value, str(error)) and key != "imports":  # whose names are any words of the text
                    raise
            else:
                check_accepted(config, key, value)
    assert not wrong, "\n".join(f"{what}: {error}" for what, error in sorted(wrong.items()))


CONFIG = Path(__file__).parents[1] / "configs" / "digits.py"
SUITE = str(CONFIG.parent / "suites" / "digits.py")
PROGRAMS = {
    "main": (main.main, main._FLAGS, [f"--config={CONFIG}", "--workdir=run"]),
    "sample": (sample.main, sample._FLAGS, ["--workdir=run"]),
    "export": (export.main, export._FLAGS, ["--workdir=run", "--out=out"]),
    "precompute": (precompute.main, precompute._FLAGS, ["--source=digits", "--source_split=eval", "--out=out"]),
    "compare": (lambda: compare.main(SUITE), compare._FLAGS, ["--workdir=run"]),
    "bench": (lambda: bench.main("step"), bench._FLAGS, ["--sizes=8", "--image_sizes=64"]),
}
PREFIXES = {"main": "config.", "bench": "set="}  # of keys
FOUND = {  # in longer runs
    "main": [("config.data.num_classes", 10**12), ("config.model.depth", 10**400)],
    "precompute": [("image_size", 10**12), ("batch_size", 2**64), ("out", "\udcff")],
    "bench": [("set=data.source", []), ("set=optimizer.learning_rate", 10**400)],
}
NOT_FUZZED = {"compilation_cache", "aot"}  # what they set would stay
EXPLAINED = ("as it should", "memory does not suffice", "holds no finished latents", "is a folder")


def stop(*args, **kwargs):
    raise OSError("as it should")


def encode_nothing(job):
    size = job.image_size // job.vae.downsampling
    return lambda images: 2 * [np.zeros((len(images), 2, size, size, 4), np.float16)]


@pytest.fixture
def without_work(monkeypatch, tmp_path):
    """Programs that stop where their work would begin."""
    for program, name in (
        (main, "train"),
        (sample, "load_run"),
        (export, "read_config"),
        (bench, "print_rows"),
        (compare, "_run"),
    ):
        monkeypatch.setattr(program, name, stop)
    monkeypatch.setattr(main, "build_experiment", lambda config: None)
    monkeypatch.setattr(precompute, "from_diffusers", lambda *args, **kwargs: (AutoencoderKL(), {}))
    monkeypatch.setattr(precompute_job, "make_encoder", encode_nothing)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("num_cases", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_command_lines(program, num_cases, without_work, tmp_path, monkeypatch):
    start, flags, arguments = PROGRAMS[program]
    names = sorted({flags[name].name for name in flags} - NOT_FUZZED)
    keys = [PREFIXES.get(program, "") + key for key in [*known_options(default_config()), *GROUPS]]
    rng, wrong = random.Random(0), {}
    drawn = (rng.choice(rng.choice([names, keys]) if program in PREFIXES else names) for _ in range(num_cases))
    for flag, value in [*FOUND.get(program, []), *((flag, rng.choice([*TEXTS, *NUMBERS])) for flag in drawn)]:
        (tmp_path / "t" / "a" / "b").mkdir(parents=True)  # "../.." stays below tmp_path
        monkeypatch.chdir(tmp_path / "t" / "a" / "b")
        with watched(wrong, f"--{flag}={value!r:.20}", 5):
            code, printed = run_program(start, *arguments, f"--{flag}={value}", flag_values=flags)
            errors = [line for line in printed.splitlines() if "rror" in line]
            assert code in (0, 1) and "Traceback" not in printed, errors
            names_of = (re.split("[.=]", flag)[-1], str(value).strip()[:20] or "''", repr(value)[1:20], *EXPLAINED)
            assert code == 0 or any(text in printed for text in names_of), errors
        shutil.rmtree(tmp_path / "t")
    assert not wrong, "\n".join(f"{what}: {error}" for what, error in sorted(wrong.items()))
