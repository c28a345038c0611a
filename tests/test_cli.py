"""Programs find their hosts, and leave with an exit code that says what a launch script should do."""

import os
import random
import subprocess
import sys

import pytest
from absl import app
from programs import run_program

from diffussm_jax import cli

JOIN = """
from diffussm_jax import cli
cli.join_hosts("auto")
import jax
print(jax.process_index(), jax.process_count())
"""
LEAVE = """
from absl import app
from diffussm_jax import cli
def main():
    raise {exception}
cli.run(main)
"""


def test_processes_of_a_slurm_job_find_each_other():
    """As srun starts them, which tells each by its environment who it is."""
    job = {"SLURM_JOB_ID": str(random.randrange(10**6)), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    processes = []
    for i in range(2):
        environment = os.environ | job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
        processes.append(
            subprocess.Popen([sys.executable, "-c", JOIN], env=environment, stdout=subprocess.PIPE, text=True)
        )
    assert [process.communicate(timeout=120)[0].split() for process in processes] == [["0", "2"], ["1", "2"]]


def test_a_job_of_one_process_joins_nobody(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setattr("jax.distributed.initialize", lambda *args: 1 / 0)
    cli.join_hosts("auto")
    cli.join_hosts("none")


@pytest.mark.parametrize("value", ["", "host", "host:1", "host:1,2", "host,2,0", "host:1,two,0", "host:1,2,0,0"])
def test_malformed_hosts_are_named(value):
    with pytest.raises(ValueError, match=f"must be auto, none or COORDINATOR:PORT.*got '{value}'"):
        cli.join_hosts(value)


EXIT_CODES = [
    (ValueError, 1, False),
    (OSError, 1, False),
    (FloatingPointError, 1, False),
    (RuntimeError, cli.CRASHED, True),
    (app.UsageError, 1, False),
]


@pytest.mark.parametrize("exception,code,has_traceback", EXIT_CODES)
def test_exit_codes(exception, code, has_traceback):
    def main():
        raise exception("wrong")

    found, printed = run_program(main)
    assert (found, "Traceback" in printed) == (code, has_traceback)
    assert "wrong" in printed


def test_exit_code_of_a_process():
    command = [sys.executable, "-c", LEAVE.format(exception="RuntimeError('wrong')")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == cli.CRASHED and "Traceback" in done.stderr and "wrong" in done.stderr
