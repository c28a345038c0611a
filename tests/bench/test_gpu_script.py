"""The one command that measures a GPU: its flags are the benchmarks', and what fails does not stop the rest."""

import copy
import os
import shlex
import subprocess
from pathlib import Path

from diffussm_jax.bench import __main__ as command_line

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.sh"
FAKE = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$CALLS"
echo >> "$CALLS"
[[ $* != *" block "* ]]
"""


def test_the_commands_are_understood_and_a_failure_is_told(tmp_path):
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(FAKE)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "CALLS": str(calls)}
    done = subprocess.run(["bash", SCRIPT, "chip"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "failed: bench block --sizes=S,L,XL --csv=benchmarks/chip_block.csv\n"
    commands = [shlex.split(line) for line in calls.read_text().splitlines()]
    assert [command[2] for command in commands] == [
        *("errors", "ssm", "ssm", "ssm", "step", "step", "block", "sample", "ssm", "lengths", "ssm"),
    ]
    for command in commands:
        assert command[:2] == ["-m", "diffussm_jax.bench"]
        copy.deepcopy(command_line._FLAGS)(command[2:])  # raises for a flag or a value that there is not


def test_a_name_is_needed():
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True)
    assert done.returncode != 0 and "usage: bash benchmarks/gpu.sh NAME" in done.stderr
