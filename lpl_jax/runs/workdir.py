"""The folder of a run: one process at a time, one config, the same inputs, and what is read back of it.

    WORKDIR/config.json   the resolved experiment
    WORKDIR/given.json    the config as it was given, before presets and "auto" became values
    WORKDIR/inputs.json   what the run learns from, by content: its store and its frozen networks

It may be on gs://, as Orbax writes checkpoints to local folders and there. Object storage has no locks: that no two
processes train in one remote folder is left to who starts them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lpl_jax.data.store import StoreIdentity
from lpl_jax.errors import InputError, some
from lpl_jax.experiment.build import Experiment, build, to_dict
from lpl_jax.io.atomic import write_json, write_text
from lpl_jax.io.jsons import checked, read_any, read_json, record, signed
from lpl_jax.io.paths import AnyPath, PathLike, to_path
from lpl_jax.io.places import need_folder

CONFIG = "config.json"
CLASSES = "classes.json"
GIVEN = "given.json"
INPUTS = "inputs.json"
CHECKPOINTS = "checkpoints"
# What may change when a run is resumed: it does not touch the numbers, or only how far they go.
RESUMABLE = (
    "data.store",
    "data.identity",
    "mesh",
    "loss.lpl_chunk",
    "model.attention",
    "sampling",
    "evaluation",
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.max_nonfinite",
    "checkpoint",
)


def run_folder(text: PathLike, name: str = "--workdir") -> AnyPath:
    """The path of a run's folder, as a user has typed it.

    Raises InputError as `to_path` does, for s3://, and for a path that is a file, or in one.
    """
    path = to_path(text, name, remote=("gs",))
    need_folder(path, name)
    return path


def read_experiment(workdir: PathLike) -> Experiment:
    """The resolved experiment of a run. Raises InputError where `workdir` is not the folder of one."""
    return _experiment_of(run_folder(workdir))


def _experiment_of(workdir: AnyPath) -> Experiment:
    raw = _read_config(workdir)
    try:
        return build(raw)
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:  # JSON of another form
        raise InputError(f"{workdir / CONFIG} is not the config of a run: {error}") from error


def write_config(
    experiment: Experiment,
    workdir: AnyPath,
    given: Mapping[str, Any] | None = None,
    inputs: "Inputs | None" = None,
) -> None:
    """Writes the resolved experiment, on the first process, and what it was resolved from and learns from if known.

    What is there already is left as it is.
    """
    learned = inputs and {**inputs._asdict(), "store": inputs.store._asdict()}
    contents = {INPUTS: learned, GIVEN: given, CONFIG: to_dict(experiment)}
    for name, content in contents.items() if jax.process_index() == 0 else ():
        path, text = workdir / name, json.dumps(signed(content or {}), indent=1) + "\n"
        if content is not None and not (path.exists() and path.read_bytes() == text.encode()):
            write_text(path, text)


class Inputs(NamedTuple):
    """What decides what a run learns, beside its config: by content, as a path may hold something else tomorrow.

    autoencoder, text, comparison: fingerprints of the frozen networks' weights;
    None for those that the run does not have, or that no process sees whole. finite: whether all records of the store
    were looked through for values that are not, by `training.data.look_through`.
    """

    store: StoreIdentity
    autoencoder: str
    text: str | None = None
    comparison: str | None = None
    finite: bool = False


def read_inputs(workdir: AnyPath) -> Inputs | None:
    """What a run was begun with; None where its folder does not say. Raises InputError for a damaged file."""
    path = workdir / INPUTS
    return record(Inputs, checked(read_json(path), str(path)), str(path)) if path.exists() else None


NETWORKS = {"autoencoder": "autoencoder", "text": "text tower", "comparison": "network of the comparison"}


def check_same_inputs(inputs: Inputs, workdir: AnyPath) -> None:
    """Raises an InputError where a run is resumed on other images or networks than it was begun with.

    A store may have been moved, made again of the same images, or have grown where it was not finished. Runs of
    versions that did not note their inputs pass.
    """
    before = read_inputs(workdir)
    if before is None:
        return
    begun, now = before.store, inputs.store
    grown = begun.images is None and not begun.finished
    if not (now.same_images(begun) or grown):
        raise InputError(
            f"{workdir} was begun on other images: its store was made of {begun.source}, this one is made of "
            f"{now.source}{', as it is now' if now.source == begun.source else ''}; give that store as data.store, or "
            "another --workdir"
        )
    for name, title in NETWORKS.items():
        was, given = getattr(before, name), getattr(inputs, name)
        if was is not None and given is not None and was != given:
            raise InputError(
                f"{workdir} was begun with another {title} (weights {was[:12]}, now {given[:12]}): give that one, or "
                "another --workdir"
            )


def write_classes(names: Sequence[str], workdir: AnyPath) -> None:
    """Writes the names of the classes that a run learns, on the first process: it has them without its store."""
    if jax.process_index() == 0 and read_classes(workdir) != tuple(names):
        write_json(workdir / CLASSES, signed({"classes": list(names)}))


def read_classes(workdir: AnyPath) -> tuple[str, ...] | None:
    """The names of a run's classes; None where it has not said them. Raises InputError for a damaged file."""
    path = workdir / CLASSES
    if not path.exists():
        return None
    content = read_any(path)
    fields = {"classes": content} if isinstance(content, list) else content  # of an earlier version
    return record(_Classes, checked(fields, str(path)) if isinstance(fields, dict) else fields, str(path)).classes


class _Classes(NamedTuple):
    classes: tuple[str, ...]


def _read_config(workdir: AnyPath) -> dict[str, Any]:
    path = workdir / CONFIG
    if not path.exists():
        raise InputError(f"{path}: no such file; is {workdir} the folder of a run?")
    raw = checked(read_json(path, finite=False), str(path))  # a threshold may be infinite
    if not {"resolution", "model"} <= raw.keys():
        raise InputError(f"{path} is not the config of a run")
    # Each machine has its own kernel: a run of a TPU is sampled from on a CPU.
    model = raw["model"]
    return raw | {"model": model | {"attention": "auto"}} if isinstance(model, dict) else raw


def check_same_run(experiment: Experiment, workdir: AnyPath, given: Mapping[str, Any] | None = None) -> None:
    """A folder holds one run: what is configured now must be what it was begun with.

    given: the config that `experiment` was built from. The message then names what was changed in it, not all that
    follows from that.
    """
    try:
        saved = _experiment_of(workdir)
    except InputError as error:
        raise InputError(f"{workdir} is not the folder of a run: {workdir / CONFIG}: {error}") from error
    changed = _changes(to_dict(saved), to_dict(experiment))
    if not changed:
        return
    if given is not None and (workdir / GIVEN).is_file():
        before = checked(read_json(workdir / GIVEN, finite=False), str(workdir / GIVEN))
        changed = _changes(before, given) or changed
    raise InputError(f"{workdir} holds a run with another config: {some(changed, '; ')}; give another --workdir")


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two configs and may not when a run is resumed, in words."""
    was, is_now = (_flat(json.loads(json.dumps(each))) for each in (before, now))
    return [
        f"{name}: was {was.get(name)!r}, now {is_now.get(name)!r}"
        for name in sorted(was.keys() | is_now.keys())
        if was.get(name) != is_now.get(name) and not name.startswith(RESUMABLE) and name != "model.latent_channels"
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for name, value in tree.items():
        result |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result
