"""Programs find their hosts, and leave with an exit code that says what a launch script should do."""

import importlib
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl import app
from programs import run_program

from diffussm_jax import __main__, cli
from diffussm_jax import main as train_program
from diffussm_jax.config import load_config

CONFIGS = Path(__file__).parents[1] / "configs"

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


@pytest.mark.parametrize("name", __main__.PROGRAMS)
@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help_shows_an_example_and_every_flag_with_its_default(name, flag):
    program = importlib.import_module(f"diffussm_jax.{name}" + (".__main__" if name in ("bench", "compare") else ""))
    code, printed = run_program(program.main, flag, flag_values=program._FLAGS)
    assert code == 0 and f"python -m diffussm_jax.{name} " in printed
    for of_flag in {program._FLAGS[key].name: program._FLAGS[key] for key in program._FLAGS}.values():
        assert printed.count(f"\n  --{of_flag.name}: ") == 1
        if of_flag.default not in (None, []):
            line = printed.split(f"\n  --{of_flag.name}: ")[1].split("\n  --")[0]
            assert f"(default: {of_flag.default_as_str.strip(chr(39))})" in " ".join(line.split())
    assert ("Flags of libraries" in printed) == (flag == "--helpfull")
    assert ("absl" in printed) == (flag == "--helpfull")


def test_the_package_lists_its_programs_and_runs_one():
    command = [sys.executable, "-m", "diffussm_jax"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in listed.splitlines()[2:]] == list(__main__.PROGRAMS)
    wrong = subprocess.run([*command, "sampel"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "unknown program 'sampel'; choose one of main, sample" in wrong.stderr
    found = subprocess.run([*command, "sample", "--workdir=/nowhere"], capture_output=True, text=True)
    assert found.returncode == 1 and "/nowhere holds no run" in found.stderr and "Traceback" not in found.stderr


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


def test_the_machine_is_described_in_a_line():
    config = load_config(str(CONFIGS / "digits.py"))
    _, line = train_program.describe(config).splitlines()
    assert line == f"{jax.device_count()} x cpu (cpu), mesh: data 1, fsdp 1, tensor 1, float32, SSM: fft"


def test_modules_are_described_without_a_workdir():
    flags = [f"--config={CONFIGS / 'digits.py'}", "--describe"]
    code, printed = run_program(train_program.main, *flags, flag_values=train_program._FLAGS)
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[2:]}
    assert code == 0 and rows["total"][0] == "337,284" and rows["blocks/W0"][0] == "16,640"
    assert rows["blocks/ssm"][0] == "25,600" and rows["share"][-3] == "7.6%"


def test_compiled_programs_are_kept_in_the_users_folder_unless_told_otherwise(tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cli.use_compilation_cache("auto")
    (key, folder), *others = found.items()
    assert key == "jax_compilation_cache_dir" and Path(folder).parent == tmp_path / "diffussm_jax" and not others
    cli.use_compilation_cache("/some/folder")
    assert found == {"jax_compilation_cache_dir": "/some/folder"}
    cli.use_compilation_cache("none")
    assert found["jax_enable_compilation_cache"] is False
    found.clear()
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", "/of/the/environment", raising=False)
    cli.use_compilation_cache("auto")
    assert found == {}


EXIT_CODES = [
    (ValueError, 1, False),
    (OSError, 1, False),
    (FloatingPointError, 1, False),
    (MemoryError, 1, False),
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


def test_sizes_beyond_the_memory_are_named(tmp_path):
    for key, value in (("batch_size", 10**15), ("data.image_size", 10**8), ("model.width", 4 * 10**14)):
        arguments = (f"--config={CONFIGS / 'digits.py'}", f"--workdir={tmp_path / 'run'}", f"--config.{key}={value}")
        code, printed = run_program(train_program.main, *arguments, flag_values=train_program._FLAGS)
        assert code == 1 and re.search(r"memory does not suffice: .* [TP]iB", printed), (key, printed)
    assert not (tmp_path / "run").exists()


def test_buckets_without_their_extra_name_it():
    def main():
        raise ImportError("Please install gcsfs to access Google Storage")  # as fsspec raises it

    code, printed = run_program(main)
    assert code == 1 and "pip install 'diffussm_jax[gcs]'" in printed and "Traceback" not in printed


def test_exit_code_of_a_process():
    command = [sys.executable, "-c", LEAVE.format(exception="RuntimeError('wrong')")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == cli.CRASHED and "Traceback" in done.stderr and "wrong" in done.stderr
