"""The benchmarks' command line in this process: what it prints, without the seconds that a new one takes to start."""

import pytest
from absl.testing import flagsaver

from diffussm_jax import cli
from diffussm_jax.bench import __main__ as program


@pytest.fixture
def bench_command(monkeypatch, capsys):
    """bench_command("ssm", "--repeats=1") -> what `python -m diffussm_jax.bench ssm --repeats=1` prints."""
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)  # or these tests would keep it, too

    def run(*arguments):
        saved = flagsaver.save_flag_values(program._FLAGS)
        try:
            _, *rest = program._FLAGS(["bench", *arguments])
            assert program.main(*rest) == 0
        finally:
            flagsaver.restore_flag_values(saved, program._FLAGS)
        return capsys.readouterr().out

    return run
