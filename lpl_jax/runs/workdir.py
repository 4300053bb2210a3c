"""The folder of a run: one process at a time, one config, and what is read back of it.

It may be on gs://, as Orbax writes checkpoints to local folders and there. Object storage has no locks: that no two
processes train in one remote folder is left to who starts them.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from lpl_jax import distributed
from lpl_jax.errors import InputError
from lpl_jax.experiment.build import Experiment, build, to_dict
from lpl_jax.io.atomic import write_json, write_text
from lpl_jax.io.paths import AnyPath, PathLike, is_remote, to_path

CONFIG = "config.json"
CLASSES = "classes.json"
CHECKPOINTS = "checkpoints"
LOCK = "lock"
# What may change when a run is resumed: it does not touch the numbers, or only how far they go.
RESUMABLE = (
    "data.store",
    "mesh",
    "loss.lpl_chunk",
    "model.attention",
    "sampling",
    "evaluation",
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
)


def run_folder(text: PathLike, name: str = "--workdir") -> AnyPath:
    """The path of a run's folder, as a user has typed it. Raises InputError as `to_path` does, and for s3://."""
    return to_path(text, name, remote=("gs",))


@contextlib.contextmanager
def only_run_in(workdir: AnyPath):
    """Holds the folder's lock, which the system releases when the process ends, however it does.

    A remote folder has none, which is said in a line. A folder that was created for the lock is removed where
    nothing else is in it at the end.
    """
    with contextlib.ExitStack() as stack:

        def lock():
            if is_remote(workdir):
                print(f"{workdir} is remote and has no lock: no other process may train there", flush=True)
            else:
                stack.enter_context(_locked(workdir))

        # Also the point up to which nobody writes: all processes have seen the folder as it was.
        distributed.on_first(lock)
        yield


@contextlib.contextmanager
def _locked(workdir: Path):
    is_new, path = not workdir.exists(), workdir / LOCK
    workdir.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):  # another process has removed this one
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            raise InputError(f"{workdir} is in use by another process that trains: give another --workdir") from None
        try:
            yield
        finally:
            if is_new and [entry.name for entry in workdir.iterdir()] == [LOCK]:
                path.unlink()
                workdir.rmdir()


def read_experiment(workdir: PathLike) -> Experiment:
    """The resolved experiment of a run. Raises InputError where `workdir` is not the folder of one."""
    workdir = run_folder(workdir)
    raw = _read_config(workdir)
    try:
        return build(raw)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # JSON of another form than a config's
        raise InputError(f"{workdir / CONFIG} is not the config of a run: {error}") from error


def write_config(experiment: Experiment, workdir: AnyPath) -> None:
    """Writes the resolved experiment, on the first process, unless it is there already."""
    path, text = workdir / CONFIG, json.dumps(to_dict(experiment), indent=1) + "\n"
    if jax.process_index() == 0 and not (path.exists() and path.read_text() == text):
        write_text(path, text)


def write_classes(names: Sequence[str], workdir: AnyPath) -> None:
    """Writes the names of the classes that a run learns, on the first process: it has them without its store."""
    if jax.process_index() == 0 and read_classes(workdir) != tuple(names):
        write_json(workdir / CLASSES, list(names))


def read_classes(workdir: AnyPath) -> tuple[str, ...] | None:
    """The names of a run's classes; None where it has not said them. Raises InputError for a damaged file."""
    path = workdir / CLASSES
    try:
        names = json.loads(path.read_text())
    except OSError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path} is no list of names")
    return tuple(names)


def _read_config(workdir: AnyPath) -> dict[str, Any]:
    path = workdir / CONFIG
    try:
        raw = json.loads(path.read_text())
    except OSError:
        raise InputError(f"{path}: no such file; is {workdir} the folder of a run?") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if not isinstance(raw, dict) or not {"resolution", "model"} <= raw.keys():
        raise InputError(f"{path} is not the config of a run")
    # Each machine has its own kernel: a run of a TPU is sampled from on a CPU.
    model = raw["model"]
    return raw | {"model": model | {"attention": "auto"}} if isinstance(model, dict) else raw


def check_same_run(experiment: Experiment, workdir: AnyPath) -> None:
    """A folder holds one run: what is configured now must be what it was begun with."""
    try:
        saved = build(_read_config(workdir))
    except InputError as error:
        raise InputError(f"{workdir} is not the folder of a run: {workdir / CONFIG}: {error}") from error
    before, now = _flat(to_dict(saved)), _flat(to_dict(experiment))
    differing = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(RESUMABLE) and name != "model.latent_channels"
    ]
    if differing:
        raise InputError(f"{workdir} holds a run with another config: {'; '.join(differing)}; give another --workdir")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for name, value in tree.items():
        result |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result
