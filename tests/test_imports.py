"""Imports go down only, from entry points to the core; the core knows no Flax, and the loop knows no model."""

import ast
import functools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "diffussm_jax"
LEVELS = {
    **dict.fromkeys(("ssm", "io", "options"), 0),
    "parallel": 1,
    **dict.fromkeys(("diffusion", "layers"), 2),
    **dict.fromkeys(("models", "autoencoder", "data", "evaluation"), 3),
    "training": 4,
}
ENTRY_POINT = 5
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES, MAX_LINES_OF_BUILD = 400, 200


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
