"""What the command line programs share: how they start, and how they report what is wrong with their input."""

import ctypes
import sys
from collections.abc import Callable

import jax
from absl import app, flags, logging


def run(main: Callable[..., int], flag_values: flags.FlagValues = flags.FLAGS, num_arguments: int = 0) -> None:
    """Parses the flags, calls `main` with the other arguments, of which there must be so many, and exits with its code.

    A program that may be imported beside another one has `flag_values` of its own, so that names do not collide.

    A ValueError, with which the package says what is wrong with its input, or an OSError is printed without a
    traceback, and the code is 1; with --verbosity=1 the traceback comes too. Libraries' messages below a warning are
    hidden (--verbosity=0 shows them).
    """

    def start(argv: list[str]) -> int:
        flag_values.mark_as_parsed()
        if len(argv) != 1 + num_arguments:
            raise app.UsageError(f"expected {num_arguments} arguments beside the flags, got {argv[1:]}")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            return main(*argv[1:])
        except (ValueError, OSError) as error:
            if logging.level_debug():
                raise
            print(f"error: {error}", file=sys.stderr)
            return 1

    if flag_values is not flags.FLAGS:
        flags.FLAGS.append_flag_values(flag_values)
    app.run(start)


def keep_freed_memory() -> None:
    """On the CPU, keeps what one step frees for the next instead of handing it back to the system.

    XLA on the CPU takes its temporary buffers from glibc, which maps and unmaps large ones each time. Without that, the
    digits train 1.3 times as fast (900 images/s against 650 on 2 cores). Elsewhere than on glibc it changes nothing.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if jax.default_backend() == "cpu" and hasattr(libc, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def join_hosts(value: str | None) -> None:
    """Makes one JAX program of the processes of several hosts; before anything uses a device.

    Args:
      value: of a flag --distributed: "auto" on TPU pods and SLURM, COORDINATOR:PORT,NUM_PROCESSES,PROCESS_ID, or None
        for one host.

    Raises:
      ValueError: it is malformed, or "auto" and no cluster is found.
    """
    if value is None:
        return
    if value == "auto":
        jax.distributed.initialize()
        return
    coordinator, *numbers = value.split(",")
    if ":" not in coordinator or len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"--distributed must be auto or COORDINATOR:PORT,NUM_PROCESSES,PROCESS_ID, got {value!r}")
    jax.distributed.initialize(coordinator, *map(int, numbers))
