"""What the command line programs share: how they start, and how they report what is wrong with their input."""

import sys
from collections.abc import Callable

from absl import app, flags, logging


def run(main: Callable[..., int], num_arguments: int = 0) -> None:
    """Parses the flags, calls `main` with the other arguments, of which there must be so many, and exits with its code.

    A ValueError or FileNotFoundError, with which the package says what is wrong with its input, is printed without a
    traceback, and the code is 1; with --verbosity=1 the traceback comes too. Libraries' messages below a warning are
    hidden (--verbosity=0 shows them).
    """

    def start(argv: list[str]) -> int:
        if len(argv) != 1 + num_arguments:
            raise app.UsageError(f"expected {num_arguments} arguments beside the flags, got {argv[1:]}")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            return main(*argv[1:])
        except (ValueError, FileNotFoundError) as error:
            if logging.level_debug():
                raise
            print(f"error: {error}", file=sys.stderr)
            return 1

    app.run(start)
