"""Signals that end a program: SIGTERM and the first Ctrl-C do the same in every verb of `lpl`.

    between the steps of a run    the step is finished and saved (`StopSignal`)
    anywhere else                 `Stopped` is raised in the main thread, which removes what it has half written
    a second signal               the program ends at once
    nothing of this comes about   the program ends all the same, after `PROMPTLY` seconds, or `PATIENCE` while it saves

All on disk is complete under its name or not there, so a program may end at any moment. The status is 130, and a line
on stderr says how to go on. Python runs handlers in its main thread alone, between two bytecodes, and that may sit in
XLA's compiler for minutes: so a thread hears of signals, too (`signal.set_wakeup_fd`), and ends the process if need be.
A signal that is ignored stays so: shells start background jobs with SIGINT ignored, and mean it.

Nothing that takes long is imported here: signals are caught before that begins.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

STATUS = 130
SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE, PROMPTLY = 15.0, 4.0  # seconds from the first signal to the end of the process, at most
SECONDS = "LPL_JAX_STOP_SECONDS"  # another PATIENCE, where a checkpoint takes longer
EXTRA = 2.0  # seconds more for who waits for another program, which takes its own
AGAIN = 0.1  # seconds until the main thread is asked again, where it could not raise what a signal asks for
TWICE = 0.1  # seconds in which a second signal is the first one: `timeout` sends it to the process and to its group
PARENT = "LPL_JAX_PARENT"  # descriptor of a pipe that is closed when the program ends that started this one


class Stopped(KeyboardInterrupt):
    """A signal ends the program: raised in the main thread, outside the steps of a run."""


_program: "_Program | None" = None  # what handles signals in this process; None where a library is used


def catch(argv: Sequence[str]) -> None:
    """For a program, before all else: from here on signals do what is said above. argv: the command, but for "lpl"."""
    global _program
    if _program is None and threading.current_thread() is threading.main_thread():
        _program = _Program(argv)


def release() -> None:
    """Undo `catch`, for a process that goes on: tests."""
    global _program
    if _program is not None:
        _program.release()
        _program = None


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """`Stopped` may be raised in the block. Elsewhere nobody catches it, and a signal ends the process at once."""
    program = _program
    if program is None:
        yield
        return
    try:
        program.unwinds = True
        yield
    finally:
        program.unwinds = False


def stopped() -> bool:
    """Whether a signal is about to end this program."""
    return _program is not None and _program.number is not None


def say(text: str = "stopped") -> None:
    """The line on stderr that says what was stopped, and how to go on. Only the first one is printed."""
    if _program is None:
        print(text, file=sys.stderr, flush=True)
    elif _program.claim():
        print(_program.line(text), file=sys.stderr, flush=True)


def call(command: Sequence[str], **options: Any) -> int:
    """As `subprocess.call`, of a verb of `lpl`. When this process ends, however it does, that one gets a SIGTERM.

    A signal to this one is passed on by the same way, and its end waited for.
    """
    import subprocess

    theirs, ours = os.pipe()
    environment = {**(options.pop("env", None) or os.environ), PARENT: str(theirs)}
    try:
        with _patient():
            process = subprocess.Popen(command, env=environment, pass_fds=(theirs,), **options)
            try:
                return process.wait()
            except BaseException:
                os.close(ours)
                ours = -1
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_patience() + EXTRA / 2)
                process.kill()
                raise
    finally:
        for end in (theirs, ours):
            if end >= 0:
                os.close(end)


def share_with_jax() -> None:
    """After `jax.distributed.initialize`: its service has taken SIGTERM, and gets it from here while steps run."""
    if _program is not None:
        _program.share_with_jax()


class StopSignal:
    """Turns the first SIGTERM or SIGINT into a request to stop before the next step.

    with StopSignal() as stop:
        for step in ...:
            if stop.before(step):
                save, wait and leave the loop

    Several processes must stop at the same step, whichever of them got the signal: there jax's coordination service,
    which hears of it, makes them agree on a step that none has begun, without touching the devices.

    Where a library is used and no program caught signals, a second one does what it always did, and nothing ends the
    process. Outside the main thread, where Python allows no handlers, nothing is caught then.
    """

    def __init__(self, signals: Sequence[signal.Signals] = SIGNALS):
        self.requested: signal.Signals | None = None
        self.raises = self.patient = False
        jax = sys.modules.get("jax")
        self._several = jax is not None and jax.process_count() > 1
        self._signals = [name for name in signals if not (self._several and name == signal.SIGTERM)]
        self._previous: dict[signal.Signals, Any] = {}

    def before(self, step: int) -> bool:
        """Whether to stop before this step, the same in all processes. All of them ask for every step, in order."""
        if self._several:
            from jax.experimental import multihost_utils

            if self.requested is None and multihost_utils.reached_preemption_sync_point(step):
                self.requested = signal.SIGTERM
                if _program is not None:
                    _program.begin(signal.SIGTERM)
        return self.requested is not None

    @contextlib.contextmanager
    def leaving(self, *, unsaved: bool) -> Iterator[None]:
        """A part in which nothing is lost: a signal raises `Stopped` in it. Not in several processes, which go on.

        unsaved: whether a state is to be saved after it, which takes its time.
        """
        if self._several:
            yield
            return
        try:
            self.raises, self.patient = True, unsaved
            if self.requested is not None:
                raise Stopped
            yield
        finally:
            self.raises, self.patient = False, True

    def request(self, number: int) -> None:
        """A signal has come: called in the main thread, by its handler."""
        if not self._several:
            self.requested = signal.Signals(number)
        if self.raises:
            raise Stopped

    def __enter__(self) -> "StopSignal":
        self.patient = True
        if _program is not None:
            _program.loop = self
            if _program.number is not None:  # it came just now, and its handler found no loop
                self.requested = _program.number
        elif threading.current_thread() is threading.main_thread():
            caught = [name for name in self._signals if signal.getsignal(name) is not signal.SIG_IGN]
            self._previous = {name: signal.signal(name, self._handle) for name in caught}
        return self

    def __exit__(self, *_):
        if _program is not None and _program.loop is self:
            _program.loop = None
        for name, handler in self._previous.items():
            signal.signal(name, handler)
        self._previous = {}

    def _handle(self, number, _frame):
        """Without a program."""
        self.__exit__()
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # the one that jax listens to
        else:
            self.request(number)


class _Program:
    """The handler of a program's signals, and the thread that watches over it.

    number: of the first signal. loop: takes it. unwinds: whether somebody catches `Stopped`.
    extra: seconds more than the program takes that is waited for.
    """

    def __init__(self, argv: Sequence[str]):
        self.number: signal.Signals | None = None
        self.loop: StopSignal | None = None
        self.unwinds, self.extra = False, 0.0
        self._argv = list(argv)
        self._delivered = self._refused = False
        self._deadline: float | None = None
        self._said = threading.Lock()
        self._jax: Any = None
        self._parent = _parent()
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        caught = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._handle) for number in caught}
        os.register_at_fork(after_in_child=self.release)  # a signal to a worker is none to us
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def release(self) -> None:
        """Signals do what they did before."""
        if self._previous:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous = {}

    def begin(self, number: int) -> None:
        """The first signal has come. In either thread, whichever hears of it first."""
        if self.number is None:
            patient = self.extra > 0 or (self.loop is not None and self.loop.patient)
            self._deadline = time.monotonic() + (_patience() + self.extra if patient else PROMPTLY)
            self.number = signal.Signals(number)

    def claim(self) -> bool:
        """Whether nobody has said yet that the program was stopped."""
        return self._said.acquire(blocking=False)

    def line(self, text: str) -> str:
        """What is said of it."""
        import shlex

        by = f" by {self.number.name}" if self.number else ""
        return f"lpl {' '.join(self._argv[:1])}: {text}{by}; to go on: {shlex.join(['lpl', *self._argv])}"

    def end(self) -> None:
        """The end of the process, now. Threads may hold the locks of Python's streams: these are passed over."""
        if self.claim():
            os.write(2, f"{self.line('stopped')}\n".encode())
        os._exit(STATUS)

    def share_with_jax(self) -> None:
        """See above. What jax has installed is code in C, which Python's module knows nothing of."""
        import ctypes

        kept = ctypes.create_string_buffer(1024)  # more than a `struct sigaction` takes
        sigaction = ctypes.CDLL(None).sigaction
        sigaction(int(signal.SIGTERM), None, kept)
        self._jax = lambda: sigaction(int(signal.SIGTERM), kept, None)
        if signal.SIGTERM in self._previous:
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number, frame):
        """In the main thread, once; the thread sees to a second signal."""
        if self._delivered:
            return
        self.begin(number)
        importing = _importing(frame)
        if self.loop is None and (importing or not self.unwinds):
            self.end()
        if self.loop is not None and self.loop.raises and importing:
            self._refused = True
            os.write(self._write, b"\0")  # the thread asks again
            return
        self._delivered = True
        if self.loop is not None:
            self.loop.request(number)
        else:
            raise Stopped

    def _watch(self) -> None:
        """In the thread: ends the process at a second signal, or when the time is up."""
        first, asked, sources = None, 0, [self._read, *([] if self._parent is None else [self._parent])]
        while True:
            left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            if self._refused:
                left = min(left or 0.0, AGAIN)
            ready, _, _ = select.select(sources, [], [], left)
            if self._parent in ready:  # closed
                sources.remove(self._parent)
                if self.number is None:
                    os.kill(os.getpid(), signal.SIGTERM)
            numbers = os.read(self._read, 64) if self._read in ready else b""
            for number in numbers:
                if number not in SIGNALS:
                    continue
                if asked:  # that was from here
                    asked -= 1
                    continue
                if first is None:
                    first = time.monotonic()
                    self.begin(number)
                    self._tell_jax()
                elif time.monotonic() - first > TWICE:
                    self.end()
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self.end()
            if self._refused and self.number is not None and not ready:
                self._refused, asked = False, asked + 1
                self._ask()

    def _ask(self) -> None:
        """Sends the main thread the signal again: a true one, as a simulated one would not end its sleep."""
        main = threading.main_thread().ident
        if main is not None and self.number is not None:
            signal.pthread_kill(main, self.number)

    def _tell_jax(self) -> None:
        """Its handler is put back, and gets the signal."""
        if self._jax is not None and self.loop is not None:
            self._jax()
            os.kill(os.getpid(), signal.SIGTERM)


def _importing(frame: Any) -> bool:
    """Whether a module is being imported: code in C++ that begins there breaks down at an exception."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _patience() -> float:
    try:
        return max(1.0, float(os.environ.get(SECONDS, PATIENCE)))
    except ValueError:
        return PATIENCE


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    """While another program runs, which may have something to save."""
    if _program is None:
        yield
        return
    try:
        _program.extra = EXTRA
        yield
    finally:
        _program.extra = 0.0


def _parent() -> int | None:
    """The pipe of the program that started this one; it is for no process that is started here."""
    given = os.environ.pop(PARENT, "")
    if not given.isdecimal():
        return None
    try:
        os.set_inheritable(int(given), False)
        return int(given)
    except OSError:
        return None
