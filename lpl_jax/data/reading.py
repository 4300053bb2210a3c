"""Examples of many units, decoded by threads ahead of who takes them; an item that cannot be read is a skip."""

import queue
import threading
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from lpl_jax.data.examples import Example, Item, Note, Skipped, Unit
from lpl_jax.errors import InputError

MOST_WAITING = 2**29  # bytes of files that are in memory before they are decoded; a single one may have more


class Loaded(NamedTuple):
    """An item of unit number `unit` that was loaded or skipped, or a note; None marks the end of the unit."""

    unit: int
    item: Example | Skipped | Note | None


def load_units(units: Iterable[tuple[int, Unit]], *, threads: int, ahead: int) -> Generator[Loaded, None, None]:
    """The examples of numbered units, in their order; after each unit its end.

    One thread goes through the units (which reads tar files), `threads` decode; at most `ahead` items are on their way,
    and `MOST_WAITING` bytes of them.

    Raises:
      whatever going through a unit raises, and errors of the disk or network. Whatever else loading an item raises is a
      `Skipped`.
    """
    waiting: queue.Queue[Future | None] = queue.Queue(max(1, ahead))
    stopped = threading.Event()
    memory = _Memory(MOST_WAITING)

    def load(number: int, unit: Unit, item: Item | Skipped | Note) -> Loaded:
        try:
            return _load(number, unit.name, item)
        finally:
            memory.release(_size(item))

    def put(entry: Future | None) -> None:
        while not stopped.is_set():
            try:
                return waiting.put(entry, timeout=0.1)
            except queue.Full:
                continue
        raise _Stopped

    def feed(pool: ThreadPoolExecutor) -> None:
        try:
            for number, unit in units:
                for item in unit.items():
                    if not memory.take(_size(item), stopped):
                        raise _Stopped
                    put(pool.submit(load, number, unit, item))
                put(_finished(Loaded(number, None)))
            put(None)
        except _Stopped:
            pass
        except BaseException as error:
            failed = Future()
            failed.set_exception(error)
            put(failed)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        feeder = threading.Thread(target=feed, args=(pool,), daemon=True)
        feeder.start()
        try:
            while (entry := waiting.get()) is not None:
                yield entry.result()
        finally:
            stopped.set()
            feeder.join()
            pool.shutdown(cancel_futures=True)


class _Memory:
    """Bytes that may be held at once."""

    def __init__(self, most: int):
        self._most, self._held, self._changed = most, 0, threading.Condition()

    def take(self, size: int, stopped: threading.Event) -> bool:
        """Waits until so many are free, or none are held; False where it was stopped meanwhile."""
        with self._changed:
            while self._held and self._held + size > self._most:
                if stopped.is_set():
                    return False
                self._changed.wait(0.1)
            self._held += size
            return True

    def release(self, size: int) -> None:
        with self._changed:
            self._held -= size
            self._changed.notify_all()


def _size(item: Item | Skipped | Note) -> int:
    return item.size if isinstance(item, Item) else 0


class _Stopped(Exception):
    """Nobody takes what is read any more."""


def _load(number: int, unit: str, item: Item | Skipped | Note) -> Loaded:
    if not isinstance(item, Item):
        return Loaded(number, item)
    try:
        return Loaded(number, item.load())
    except OSError:  # of the disk or the network: the item is not at fault
        raise
    except InputError as error:
        reason = str(error)
    except Exception as error:  # a decoder that fails in a way that nobody has foreseen
        reason = f"{item.key}: cannot be read ({type(error).__name__}: {error})"
    return Loaded(number, Skipped(item.key, unit, " ".join(reason.split())))


def _finished(loaded: Loaded) -> Future:
    result = Future()
    result.set_result(loaded)
    return result
