"""What the command line programs share: how they start, and how they report what is wrong with their input."""

import ctypes
import glob
import importlib.metadata
import importlib.util
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from diffussm_jax import config as config_lib
from diffussm_jax import migrations
from diffussm_jax.options import flatten

# The exit code of a program that was told by SIGTERM to leave, and saved: the same command goes on. (EX_TEMPFAIL of
# <sysexits.h>.) The launch scripts start it again.
PREEMPTED = 75
# That of an unexpected exception, such as a host that was lost (EX_SOFTWARE); the launch scripts try again, while 1,
# an error in the input or a run that diverged, would only come again.
CRASHED = 70


def run(main: Callable[..., int], flag_values: flags.FlagValues = flags.FLAGS, num_arguments: int = 0) -> None:
    """Parses the flags, calls `main` with the other arguments, of which there must be so many, and exits with its code.

    A program that may be imported beside another one has `flag_values` of its own, so that names do not collide.

    A ValueError, with which the package says what is wrong with its input, an OSError, or a FloatingPointError, with
    which a run says that it diverged, is printed without a traceback, and the code is 1; with --verbosity=1 the
    traceback comes too. After any other exception the code is 70. Libraries' messages below a warning are hidden
    (--verbosity=0 shows them).
    """

    def start(argv: list[str]) -> int:
        flag_values.mark_as_parsed()
        if len(argv) != 1 + num_arguments:
            raise app.UsageError(f"expected {num_arguments} arguments beside the flags, got {argv[1:]}")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            return main(*argv[1:])
        except (ValueError, OSError, FloatingPointError) as error:
            if logging.level_debug():
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr)
            return 1
        except app.UsageError:
            raise
        except Exception:
            traceback.print_exc()
            return CRASHED

    sys.argv[1:] = [_renamed(argument) for argument in sys.argv[1:]]
    if flag_values is not flags.FLAGS:
        flags.FLAGS.append_flag_values(flag_values)
        if "config" in flag_values and isinstance(flag_values["config"].parser, _ConfigParser):
            flag_values["config"].flag_values = flags.FLAGS  # its overrides are defined where they are parsed
    app.run(start)


_OVERRIDE = re.compile(r"--?config\.(?P<key>[\w.]+)(?:=(?P<value>.*))?$", re.DOTALL)


def _renamed(argument: str) -> str:
    """An override of a config key under today's name, should it have had another one."""
    match = _OVERRIDE.match(argument)
    return argument.replace(match["key"], migrations.today(match["key"]), 1) if match else argument


def _overrides(arguments: Sequence[str]) -> dict[str, str]:
    """The overrides of the config on a command line, --config.KEY=VALUE or --config.KEY VALUE."""
    found = {}
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if match := _OVERRIDE.match(argument):
            found[match["key"]] = following if match["value"] is None else match["value"]
    return found


class _ConfigParser(flags.ArgumentParser):
    """Loads a config file, and makes the choices that the command line makes, before it overrides single values."""

    syntactic_help = "A file of configs/, such as configs/digits.py."

    def parse(self, argument: str) -> ConfigDict:
        overrides = _overrides(sys.argv[1:])
        config = config_lib.make_choices(config_lib.load_config(argument), overrides)
        config_lib.check_keys(overrides, flatten(config))
        return config.lock()

    def flag_type(self) -> str:
        return "config file"


def define_config(flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
    """Defines --config=FILE.py[:ARGUMENT] and the overrides behind it, --config.model.depth=2.

    An override that chooses a component, --config.sampling.sampler=heun, takes effect first, wherever it stands, so
    that the options of that component can be given too.
    """
    holder = config_flags.DEFINE_config_file(
        "config", None, "A file of configs/, such as configs/digits.py.", flag_values=flag_values
    )
    flag_values["config"].parser = _ConfigParser()
    return holder


def keep_freed_memory() -> None:
    """On the CPU, keeps what one step frees for the next; to be called before anything uses a device.

    XLA on the CPU takes its temporary buffers from glibc, which hands large ones back to the system, and so does each
    thread's own arena. Without that, the SSM's gradients take 0.8 of the time, and the digits train 1.3 times as fast.
    Elsewhere than on glibc it changes nothing.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt") and (_is_cpu_only() or jax.default_backend() == "cpu"):
        M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # <malloc.h>
        libc.mallopt(M_ARENA_MAX, 1)  # has no effect on threads that allocated before
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _is_cpu_only() -> bool:
    """Whether JAX can have no other devices; does not make it look for them, which starts threads."""
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return jax.config.jax_platforms == "cpu" or not (plugins or importlib.util.find_spec("libtpu"))


def join_hosts(value: str) -> None:
    """Makes one JAX program of the processes of several hosts; before anything uses a device.

    Args:
      value: of a flag --distributed: "auto" joins where SLURM or Open MPI started several processes, or on a TPU
        machine, where JAX finds the others by itself; "none" does not; COORDINATOR:PORT,NUM_PROCESSES,PROCESS_ID.

    Raises:
      ValueError: it is malformed.
    """
    if value == "none":
        return
    if value == "auto":
        if _is_one_of_several_processes() or _is_on_tpu_machine():
            jax.distributed.initialize()
        return
    coordinator, *numbers = value.split(",")
    if ":" not in coordinator or len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise ValueError(
            f"--distributed must be auto, none or COORDINATOR:PORT,NUM_PROCESSES,PROCESS_ID, got {value!r}"
        )
    jax.distributed.initialize(coordinator, *map(int, numbers))


def _is_one_of_several_processes() -> bool:
    counts = (("SLURM_PROCID", "SLURM_NTASKS"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
    return any(rank in os.environ and int(os.environ.get(count, "1")) > 1 for rank, count in counts)


def _is_on_tpu_machine() -> bool:
    has_chips = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    return has_chips and importlib.util.find_spec("libtpu") is not None and os.environ.get("JAX_PLATFORMS") != "cpu"
