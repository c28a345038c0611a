"""Imports go down only, from entry points to the core, and the core knows no Flax (CONTRIBUTING, "Layout")."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "diffussm_jax"
LEVELS = {
    "ssm": 0,
    "config": 0,
    "diffusion": 1,
    "parallel": 1,
    "models": 2,
    "autoencoder": 2,
    "data": 2,
    "evaluation": 2,
}
LEVELS |= {"training": 3}
ENTRY_POINT = 4
MODULES = sorted(PACKAGE.rglob("*.py"))


def part(name):
    """diffussm_jax.ssm.fft -> ssm."""
    return name.split(".")[1] if "." in name else ""


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "diffussm_jax":
                yield from (f"diffussm_jax.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    level = LEVELS.get(own, ENTRY_POINT)
    for name in imported(path):
        if name.startswith("diffussm_jax") and part(name) != own:
            other = LEVELS.get(part(name), ENTRY_POINT)
            assert other < level or level == other == ENTRY_POINT, f"{own} (level {level}) imports {name}"
        if own in ("ssm", "diffusion"):
            assert name.split(".")[0] != "flax", f"{own} is plain JAX, but imports {name}"


def test_the_rule_is_about_real_modules():
    assert len(MODULES) > 20 and {part(n) for p in MODULES for n in imported(p) if n.startswith("diffussm_jax")} > {
        "ssm"
    }
