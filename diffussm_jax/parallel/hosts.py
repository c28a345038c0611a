"""Agreement between the processes of several hosts."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils


@contextlib.contextmanager
def barrier_on_all_hosts() -> Iterator[None]:
    """A barrier at the end for all hosts. If one host failed, all raise instead of waiting forever.

    Raises:
      ValueError: another host failed with a ValueError or an OSError.
    """
    if jax.process_count() == 1:
        yield
        return
    error = None
    try:
        yield
    except (ValueError, OSError) as e:
        error = e
    have_failed = multihost_utils.process_allgather(np.array([error is not None])).ravel()
    if error is not None:
        raise error
    if have_failed.any():
        raise ValueError(f"host {have_failed.argmax()} failed, see its error")


def of_first_host(value: bool) -> bool:
    """The value of the first process, in all of them, so that they take the same branch."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))
