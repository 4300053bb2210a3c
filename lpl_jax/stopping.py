"""Signals that end a program."""

import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Turns the first SIGTERM or SIGINT into a request to stop; a second one does what it always did.

    with StopSignal() as stop:
        for step in ...:
            if stop.before(step):
                save, wait and leave the loop

    Several processes must stop at the same step, whichever of them got the signal: there SIGTERM is left to jax, whose
    coordination service makes them agree on a step that none has begun, without touching the devices. Outside the main
    thread, where Python allows no handlers, nothing is caught.
    """

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT)):
        self.requested: signal.Signals | None = None
        self._several = jax.process_count() > 1
        self._signals = [name for name in signals if not (self._several and name == signal.SIGTERM)]
        self._previous: dict[signal.Signals, Any] = {}

    def before(self, step: int) -> bool:
        """Whether to stop before this step, the same in all processes. All of them ask for every step, in order."""
        if self._several and self.requested is None and multihost_utils.reached_preemption_sync_point(step):
            self.requested = signal.SIGTERM
        return self.requested is not None

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            # A signal that is ignored stays so: shells start background jobs with SIGINT ignored, and mean it.
            caught = [name for name in self._signals if signal.getsignal(name) is not signal.SIG_IGN]
            self._previous = {name: signal.signal(name, self._handle) for name in caught}
        return self

    def __exit__(self, *_):
        for name, handler in self._previous.items():
            signal.signal(name, handler)
        self._previous = {}

    def _handle(self, number, _frame):
        self.__exit__()
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # the one that jax listens to
        else:
            self.requested = signal.Signals(number)
