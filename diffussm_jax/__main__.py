"""Lists the programs of the package, and runs one: python -m diffussm_jax sample --workdir=runs/digits

The command `diffussm-jax` does the same.
"""

import ast
import runpy
import sys
from pathlib import Path

PROGRAMS = ("main", "sample", "evaluate", "compare", "export", "precompute", "plan", "bench")


def summary(program: str) -> str:
    """The first sentence of a program's docstring. Reads its file, and imports nothing."""
    folder = Path(__file__).parent
    path = folder / program / "__main__.py" if (folder / program).is_dir() else folder / f"{program}.py"
    line = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]
    return line.partition(":")[0].rstrip(".;") + "."


def main() -> int:
    """Runs the program that the first argument names. Returns the exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in PROGRAMS:
        del sys.argv[1]
        runpy.run_module(f"{__package__}.{name}", run_name="__main__", alter_sys=True)
        return 0
    if name not in ("--help", "-h"):
        print(f"error: unknown program {name!r}; choose one of {', '.join(PROGRAMS)}", file=sys.stderr)
        return 1
    print("diffussm-jax PROGRAM --help, or python -m diffussm_jax.PROGRAM --help, lists the flags of a program:\n")
    for program in PROGRAMS:
        print(f"  {program:<12}{summary(program)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
