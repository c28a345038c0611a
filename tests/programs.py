"""A command line in the tests' process: without the seconds that a new process takes to start."""

import contextlib
import io
import sys
from unittest import mock

from absl import app, flags
from absl.testing import flagsaver

from diffussm_jax import cli


def _run(start):
    """`absl.app.run`, which may be called once in a process, as far as the programs see it."""
    try:
        sys.exit(start(flags.FLAGS(sys.argv)))
    except (flags.Error, app.UsageError) as error:
        print(f"FATAL Flags parsing error: {error}", file=sys.stderr)
        sys.exit(1)


@contextlib.contextmanager
def _without_flags_of(flag_values):
    """No flag in absl's global ones that a program with its own would define once more."""
    names = [] if flag_values is flags.FLAGS else [name for name in flag_values if name in flags.FLAGS]
    taken = {name: flags.FLAGS[name] for name in names}
    for name in names:
        delattr(flags.FLAGS, name)
    yield
    for name, flag in taken.items():
        flags.FLAGS[name] = flag


def run_program(main, *arguments, flag_values=flags.FLAGS, num_arguments=0):
    """The exit code of `cli.run(main)` with these arguments of its command line, and what it prints."""
    printed = io.StringIO()
    with (
        _without_flags_of(flag_values),
        mock.patch.object(app, "run", _run),
        mock.patch.object(cli, "keep_freed_memory", lambda: None),  # or these tests would keep it, too
        mock.patch.object(sys, "argv", ["program", *map(str, arguments)]),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        saved, own = flagsaver.save_flag_values(flags.FLAGS), flagsaver.save_flag_values(flag_values)
        try:
            cli.run(main, flag_values, num_arguments)
        except SystemExit as exit:
            return exit.code, printed.getvalue()
        finally:
            flagsaver.restore_flag_values(own, flag_values)
            flagsaver.restore_flag_values(saved, flags.FLAGS)
    raise AssertionError("cli.run must exit")
