"""Stopping on Ctrl-C and SIGTERM, in one process or in several that must agree."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[int], int | None]]:
    """Yields a function of the step that returns which of SIGINT and SIGTERM has come, or None.

    Several processes agree: JAX's coordinator hears of a SIGTERM that any of them gets, and names a step before which
    all of them stop; Ctrl-C in one of them is passed on as SIGTERM. Alone, a second signal raises KeyboardInterrupt.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield lambda step: None
        return
    is_alone = jax.process_count() == 1

    def handler(signum, frame):
        if received:
            raise KeyboardInterrupt
        received.append(signum)
        if not is_alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def stopped(step):
        if is_alone or not multihost_utils.reached_preemption_sync_point(step):
            return received[0] if is_alone and received else None
        return received[0] if received else signal.SIGTERM

    # With several processes SIGTERM already has JAX's handler, which must stay.
    previous = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM) if is_alone or s == signal.SIGINT}
    try:
        yield stopped
    finally:
        for s, old in previous.items():
            signal.signal(s, old)
