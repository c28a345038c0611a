"""One signal asks a run to stop, a second one is obeyed at once, and handlers are put back."""

import os
import signal
import threading

import pytest

from diffussm_jax.training.signals import stop_on_signal


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_told_and_the_second_interrupts(signum):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signal() as stopped_by:
        assert stopped_by(0) is None
        os.kill(os.getpid(), signum)
        assert stopped_by(1) == stopped_by(2) == signum
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            stopped_by(3)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_elsewhere_than_in_the_main_thread_no_handler_is_set():
    before, found = signal.getsignal(signal.SIGINT), []

    def run():
        with stop_on_signal() as stopped_by:
            found.append((signal.getsignal(signal.SIGINT), stopped_by(0)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(before, None)]
