"""Imports go down only, from entry points to the core; the core knows no Flax, and the loop knows no model."""

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "diffussm_jax"
LEVELS = {
    **dict.fromkeys(("ssm", "io", "options"), 0),
    **dict.fromkeys(("parallel", "tensor_files"), 1),
    **dict.fromkeys(("diffusion", "layers"), 2),
    **dict.fromkeys(("models", "autoencoder", "data", "evaluation"), 3),
    "training": 4,
}
ENTRY_POINT = 5
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES, MAX_LINES_OF_BUILD = 400, 200

# Neither TFDS nor clu can be imported from here on.
WITHOUT_TFDS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow_datasets", "clu"):
            raise ModuleNotFoundError(f"{name} is not installed")

sys.meta_path.insert(0, Missing())
"""
READING_DIGITS = """
import diffussm_jax.main, diffussm_jax.run, diffussm_jax.sample
from diffussm_jax.config import default_config
from diffussm_jax.experiment import build_experiment

config = default_config()
assert config.data.source == "digits"
next(build_experiment(config).train_loader.iterate(0))
"""
TRAINING_ON_DIGITS = """
from diffussm_jax import load_run
from diffussm_jax.experiment import build_experiment
from diffussm_jax.training.loop import train
from tiny import tiny_config

assert train(build_experiment(tiny_config()), sys.argv[1]) is None
assert load_run(sys.argv[1]).sample(2)[0].shape == (2, 8, 8, 1)
"""


def part(name):
    """diffussm_jax.ssm.fft -> ssm."""
    return name.split(".")[1] if "." in name else ""


def own_part(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@functools.cache
def imported(path):
    """The modules that a file names in its imports; of `from a import b` also a.b, which may be a module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module != "diffussm_jax":
                found.append(node.module)
            if node.module.startswith("diffussm_jax"):
                found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)


@functools.cache
def reached(path):
    """All that importing a file imports in turn: files of the package below its top, and other libraries' names."""
    seen, to_visit, names = set(), [path], set()
    while to_visit:
        if (path := to_visit.pop()) in seen:
            continue
        seen.add(path)
        for name in imported(path):
            names.add(name)
            parts = name.split(".")
            if parts[0] == "diffussm_jax":
                inside = [PACKAGE.joinpath(*parts[1 : k + 1]) for k in range(1, len(parts))]
                to_visit += [f for p in inside for f in (p.with_suffix(".py"), p / "__init__.py") if f.exists()]
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    own = own_part(path)
    level = LEVELS.get(own, ENTRY_POINT)
    for name in imported(path):
        if name.startswith("diffussm_jax") and part(name) != own:
            other = LEVELS.get(part(name), ENTRY_POINT)
            assert other < level or level == other == ENTRY_POINT, f"{own} (level {level}) imports {name}"


@pytest.mark.parametrize("own", ["ssm", "diffusion"])
def test_the_core_knows_no_flax(own):
    for path in (PACKAGE / own).rglob("*.py"):
        assert not [name for name in reached(path) if name.split(".")[0] == "flax"], path


def test_the_loop_knows_no_model_and_no_diffusion():
    names = reached(PACKAGE / "training" / "loop.py")
    assert {"diffussm_jax.training.task", "jax"} <= names
    assert not [name for name in names if part(name) in ("models", "diffusion")]


def test_files_are_short():
    lines = {path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in MODULES}
    assert lines["build.py"] <= MAX_LINES_OF_BUILD
    assert not {path: number for path, number in lines.items() if number > MAX_LINES}


def test_the_rule_is_about_real_modules():
    parts = {part(n) for p in MODULES for n in imported(p) if n.startswith("diffussm_jax")}
    assert len(MODULES) > 20 and parts > {"ssm", "models", "diffusion", "training", "parallel", "io", "options"}


# An installation may lack TFDS and clu where no latents are read; launch/wheelhouse.sh leaves them out. It needs
# array_record, which grain imports.


def test_tfds_is_imported_by_the_readers_and_writers_of_its_files_only():
    files = {
        (path.relative_to(PACKAGE).as_posix(), top)
        for path in MODULES
        for name in imported(path)
        if (top := name.split(".")[0]) in ("tensorflow_datasets", "array_record", "clu")
    }
    assert {path for path, _ in files} == {"precompute_job.py", "data/latents.py", "data/sources.py"}
    assert {top for _, top in files} == {"tensorflow_datasets", "array_record"}


@pytest.mark.parametrize(
    "program", [READING_DIGITS, pytest.param(TRAINING_ON_DIGITS, marks=pytest.mark.slow)], ids=["reading", "training"]
)
def test_the_digits_need_neither_tfds_nor_clu(program, tmp_path):
    command = [sys.executable, "-c", WITHOUT_TFDS + program, tmp_path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), str(Path(__file__).parent)])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
