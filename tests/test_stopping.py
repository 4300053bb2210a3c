import os
import signal
import threading

import pytest

from lpl_jax.stopping import StopSignal


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal, also where the tests themselves run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_ignored_signal_stays_ignored(interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested is None


def test_first_signal_asks_to_stop_and_the_second_does_what_it_did(interruptible):
    previous = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested is signal.SIGTERM
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == previous
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with StopSignal() as stop:
        assert signal.getsignal(signal.SIGTERM) not in previous
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == previous
    assert stop.requested is None


def test_signals_are_left_alone_outside_the_main_thread():
    entered = []

    def use():
        with StopSignal() as stop:
            entered.append(stop.requested)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert entered == [None]
