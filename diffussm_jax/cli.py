"""Shared code of the command line programs: startup, flags, error reports, and joining hosts."""

import ctypes
import glob
import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from diffussm_jax import config as config_lib
from diffussm_jax import migrations
from diffussm_jax.io import cache_folder
from diffussm_jax.options import flatten

# Exit code after SIGTERM and a save (EX_TEMPFAIL of <sysexits.h>). The launch scripts repeat the command to resume.
PREEMPTED = 75
# Exit code after an unexpected exception, such as a lost host (EX_SOFTWARE). The launch scripts try again. They do not
# after 1: an error in the input or a diverged run would fail again.
CRASHED = 70


def run(main: Callable[..., int], flag_values: flags.FlagValues = flags.FLAGS, num_arguments: int | None = 0) -> None:
    """Parses the flags, calls `main` with the other `num_arguments` arguments (None: any), and exits with its code.

    Programs that can be imported together need `flag_values` of their own, so that flag names do not collide.

    A ValueError (invalid input), an OSError, a FloatingPointError (a diverged run) and a MemoryError of the host are
    printed without a traceback, and the exit code is 1. --verbosity=1 prints the traceback too. After any other
    exception the exit code is 70. Log messages of libraries below warnings are hidden; --verbosity=0 shows them. --help
    prints `help_text`.
    """

    def start(argv: list[str]) -> int:
        flag_values.mark_as_parsed()
        if num_arguments is not None and len(argv) != 1 + num_arguments:
            raise app.UsageError(f"expected {num_arguments} arguments apart from flags, got {argv[1:]}")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            return main(*argv[1:])
        except (ValueError, OSError, FloatingPointError) as error:
            if logging.level_debug():
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr)
            return 1
        except MemoryError as error:
            print(f"error: this machine's memory does not suffice: {error}. Choose smaller sizes", file=sys.stderr)
            return 1
        except app.UsageError:
            raise
        except Exception as error:
            if isinstance(error, ImportError) and (found := re.search("gcsfs|s3fs", str(error))):
                package = {"gcsfs": "'diffussm_jax[gcs]'", "s3fs": "s3fs"}[found[0]]
                print(f"error: paths of buckets need {found[0]}: pip install {package}", file=sys.stderr)
                return 1
            traceback.print_exc()
            return CRASHED

    asked = {argument.lstrip("-") for argument in sys.argv[1:] if argument.startswith("-")}
    if asked & {"help", "h", "helpshort", "helpfull"}:
        print(help_text(main, flag_values))
        if "helpfull" in asked:
            print(f"\nFlags of libraries:\n{flags.FLAGS.get_help()}")
        sys.exit(0)
    sys.argv[1:] = [_current_name(argument) for argument in sys.argv[1:]]
    if flag_values is not flags.FLAGS:
        flags.FLAGS.append_flag_values(flag_values)
        if "config" in flag_values and isinstance(flag_values["config"].parser, _ConfigParser):
            flag_values["config"].flag_values = flags.FLAGS  # its overrides are defined where they are parsed
    app.run(start)


def help_text(main: Callable, flag_values: flags.FlagValues) -> str:
    """The docstring of a program's module, then its flags with their defaults."""
    lines = [sys.modules[main.__module__].__doc__.strip(), "", "Flags:"]
    for flag in dict.fromkeys(itertools.chain.from_iterable(flag_values.flags_by_module_dict().values())):
        text = f"  --{flag.name}: {flag.help}"
        if flag.default not in (None, []):
            default = flag.default_as_str.strip("'")
            text += f" (default: {default})"
        lines += textwrap.wrap(text, 118, subsequent_indent=" " * 6)
    return "\n".join(lines)


_OVERRIDE = re.compile(r"--?config\.(?P<key>[\w.]+)(?:=(?P<value>.*))?$", re.DOTALL)


def _current_name(argument: str) -> str:
    """Replaces a former config key in an override by its current name."""
    match = _OVERRIDE.match(argument)
    return argument.replace(match["key"], migrations.today(match["key"]), 1) if match else argument


def _overrides(arguments: Sequence[str]) -> dict[str, str]:
    """The config overrides of a command line, --config.KEY=VALUE or --config.KEY VALUE."""
    found = {}
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if match := _OVERRIDE.match(argument):
            found[match["key"]] = following if match["value"] is None else match["value"]
    return found


class _ConfigParser(flags.ArgumentParser):
    """Loads a config file, and applies the command line's choices of components before its other overrides."""

    syntactic_help = "A file of configs/, such as configs/digits.py."

    def parse(self, argument: str) -> ConfigDict:
        overrides = _overrides(sys.argv[1:])
        config = config_lib.make_choices(config_lib.load_config(argument), overrides)
        config_lib.check_keys(overrides, flatten(config))
        return config.lock()

    def flag_type(self) -> str:
        return "config file"


def define_config(flag_values: flags.FlagValues) -> flags.FlagHolder:
    """Defines --config=FILE.py[:ARGUMENT] and its overrides, --config.model.depth=2.

    Overrides that choose a component, --config.sampling.sampler=heun, apply first, in any order of the command line, so
    that the options of that component can be overridden too.
    """
    help_of_flag = (
        "A file of configs/, such as configs/digits.py or configs/imagenet256.py:XL. It is a Python file, and is "
        "executed. --config.KEY=VALUE overrides a value, such as --config.model.depth=2."
    )
    holder = config_flags.DEFINE_config_file("config", None, help_of_flag, flag_values=flag_values)
    flag_values["config"].parser = _ConfigParser()
    return holder


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory on the CPU. Call it before any use of a device.

    XLA:CPU allocates temporary buffers from glibc, which returns large buffers and those of each thread's arena to the
    system. With this setting the SSM's gradients take 0.8 of the time, and the digits train 1.3 times as fast. Without
    glibc it has no effect.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt") and (_is_cpu_only() or jax.default_backend() == "cpu"):
        M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # <malloc.h>
        libc.mallopt(M_ARENA_MAX, 1)  # has no effect on threads that allocated before
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def define_checkpoint(flag_values: flags.FlagValues) -> tuple[flags.FlagHolder, flags.FlagHolder]:
    """Defines --checkpoint and --ema_sigma, which `load_run` takes."""
    checkpoint = flags.DEFINE_string(
        "checkpoint", "latest", "latest, best (by config.best_metric), or a step.", flag_values=flag_values
    )
    ema_sigma = flags.DEFINE_float(
        "ema_sigma",
        None,
        "Relative length of a post-hoc EMA, such as 0.08. Default: checkpoint's EMA.",
        flag_values=flag_values,
    )
    return checkpoint, ema_sigma


def define_sampling(flag_values: flags.FlagValues) -> Callable[[], dict[str, Any]]:
    """Defines --sampler, --steps and --guidance_scale. Returns a function of those that are set, for `load_run`."""
    holders = {
        "sampler": flags.DEFINE_string(
            "sampler", None, "ddpm, ddim, heun, ... Default: config.", flag_values=flag_values
        ),
        "num_steps": flags.DEFINE_integer(
            "steps", None, "Number of sampling steps. Default: config.", lower_bound=1, flag_values=flag_values
        ),
        "guidance_scale": flags.DEFINE_float(
            "guidance_scale",
            None,
            "Guidance scale; 1 disables guidance. Default: config.",
            lower_bound=0.0,
            flag_values=flag_values,
        ),
    }
    return lambda: {key: holder.value for key, holder in holders.items() if holder.value is not None}


def define_guide(flag_values: flags.FlagValues) -> flags.FlagHolder:
    """Defines --guide, which `load_run` takes."""
    return flags.DEFINE_string(
        "guide",
        None,
        "Autoguidance: a weaker model, the STEP of an earlier checkpoint or the WORKDIR[:STEP] of another run, takes "
        "the place of the unconditional prediction.",
        flag_values=flag_values,
    )


def define_compilation_cache(flag_values: flags.FlagValues) -> flags.FlagHolder:
    """Defines --compilation_cache; pass its value to `use_compilation_cache`."""
    return flags.DEFINE_string(
        "compilation_cache",
        "auto",
        "Folder of compiled programs, which later starts read: auto, none, or a path. auto: JAX_COMPILATION_CACHE_DIR "
        "or, if that is not set, diffussm_jax in the user's folder of caches.",
        flag_values=flag_values,
    )


def use_compilation_cache(value: str) -> None:
    """Makes JAX keep compiled programs on disk, so that a resumed run starts without compiling.

    Args:
      value: "auto", "none" or a folder. Programs for CPUs depend on the processor, so "auto" has a folder for each.
    """
    if value == "none":
        jax.config.update("jax_enable_compilation_cache", False)
    elif value != "auto":
        jax.config.update("jax_compilation_cache_dir", value)
    elif jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / _processor()))


def _processor() -> str:
    """A name for the processor's kind and instructions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    kinds = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return f"{platform.machine()}-{hashlib.sha256(repr(kinds).encode()).hexdigest()[:8]}"


def _is_cpu_only() -> bool:
    """Whether JAX can only have CPU devices. Does not initialise the backends, which would start threads."""
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return jax.config.jax_platforms == "cpu" or not (plugins or importlib.util.find_spec("libtpu"))


def join_hosts(value: str) -> None:
    """Initialises `jax.distributed` for the processes of several hosts. Call it before any use of a device.

    Args:
      value: of a flag --distributed: "auto" initialises if SLURM or Open MPI started several processes, and on TPU
        machines, where JAX finds the other hosts; "none"; or COORDINATOR:PORT,NUM_PROCESSES,PROCESS_ID.

    Raises:
      ValueError: the value is malformed.
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
