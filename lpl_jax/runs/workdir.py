"""The folder of a run: one process at a time, one config, and what is read back of it."""

import contextlib
import fcntl
import json
from pathlib import Path
from typing import Any

import jax

from lpl_jax import distributed
from lpl_jax.errors import InputError
from lpl_jax.experiment.build import Experiment, build, to_dict

CONFIG = "config.json"
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


@contextlib.contextmanager
def only_run_in(workdir: Path):
    """Holds the folder's lock, which the system releases when the process ends, however it does."""
    with contextlib.ExitStack() as stack:

        def lock():
            workdir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((workdir / LOCK).open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"{workdir} is in use by another process that trains: give another --workdir"
                raise InputError(message) from None

        # Also the point up to which nobody writes: all processes have seen the folder as it was.
        distributed.on_first(lock)
        yield


def read_experiment(workdir: str | Path) -> Experiment:
    """The resolved experiment of a run. Raises InputError where `workdir` is not the folder of one."""
    raw = _read_config(Path(workdir))
    try:
        return build(raw)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # JSON of another form than a config's
        raise InputError(f"{Path(workdir) / CONFIG} is not the config of a run: {error}") from error


def write_config(experiment: Experiment, workdir: Path) -> None:
    """Writes the resolved experiment, on the first process."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / CONFIG).write_text(json.dumps(to_dict(experiment), indent=1) + "\n")


def _read_config(workdir: Path) -> dict[str, Any]:
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


def check_same_run(experiment: Experiment, workdir: Path) -> None:
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
