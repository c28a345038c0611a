"""Runs of main as processes of their own, for the tests that stop and resume them on one device or many."""

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SMALL = ("--config.model.width=32", "--config.model.depth=2", "--config.model.scan_unroll=1")
DIGITS = ("--config=configs/digits.py", *SMALL)
QUIET = ("--config.eval_every=0", "--config.sample_every=0", "--config.data.eval_split=", "--config.log_every=1")


def start(workdir, *flags, num_devices=1, num_processes=1):
    """The processes of one run of main; their output goes to files in `workdir`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    xla_flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
    environment = os.environ | {"XLA_FLAGS": xla_flags}
    processes = []
    workdir.mkdir(parents=True, exist_ok=True)
    for i in range(num_processes):
        command = [sys.executable, "-m", "diffussm_jax.main", f"--workdir={workdir / 'run'}", *flags]
        if num_processes > 1:
            command.append(f"--distributed={address},{num_processes},{i}")
        with open(workdir / f"output_{i}", "w") as output:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output))
    return processes


def wait(workdir, processes, code=0):
    for i, process in enumerate(processes):
        found = process.wait(timeout=400)
        assert found == code, (workdir / f"output_{i}").read_text()[-4000:]


def run(workdir, *flags, code=0, **options):
    wait(workdir, start(workdir, *flags, **options), code)
    return losses(workdir)


def losses(workdir):
    path = workdir / "run" / "metrics.csv"
    if not path.exists():
        return np.array([])
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return np.array([float(row["loss"]) for row in rows])
