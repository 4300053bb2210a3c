"""Examples of many units, decoded by threads ahead of who takes them, in order."""

import queue
import threading
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from lpl_jax.data.examples import Example, Item, Note, Skipped, Unit
from lpl_jax.errors import InputError


class Loaded(NamedTuple):
    """An item of unit number `unit` that was loaded or skipped, or a note; None marks the end of the unit."""

    unit: int
    item: Example | Skipped | Note | None


def load_units(units: Iterable[tuple[int, Unit]], *, threads: int, ahead: int) -> Generator[Loaded, None, None]:
    """The examples of numbered units, in their order; after each unit its end.

    One thread goes through the units (which reads tar files), `threads` decode; at most `ahead` items are on their way.

    Raises:
      whatever reading raises that is no InputError of a single item (which becomes a `Skipped`).
    """
    waiting: queue.Queue[Future | None] = queue.Queue(max(1, ahead))
    stopped = threading.Event()

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
                    put(pool.submit(_load, number, unit.name, item))
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


class _Stopped(Exception):
    """Nobody takes what is read any more."""


def _load(number: int, unit: str, item: Item | Skipped | Note) -> Loaded:
    if not isinstance(item, Item):
        return Loaded(number, item)
    try:
        return Loaded(number, item.load())
    except InputError as error:
        return Loaded(number, Skipped(item.key, unit, " ".join(str(error).split())))


def _finished(loaded: Loaded) -> Future:
    result = Future()
    result.set_result(loaded)
    return result
