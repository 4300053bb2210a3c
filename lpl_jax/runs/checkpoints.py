"""Checkpoints of the train state, written by Orbax while training goes on.

    folder/<step>/params/      the parameters, every array with its own shape and dtype
    folder/<step>/ema_<name>/  each average of them
    folder/<step>/training/    all else of the `TrainState`: step, optimizer's state, weight of the perceptual loss
    folder/<step>/metadata/    JSON: what the run was (its config) and which version wrote it
    folder/<step>/files.json   size and CRC-32 of each file above, checked before anything is read

What is read alone has files of its own, so that no more than these are read and checked; several processes share the
checking. A checkpoint appears under its final name only when it is complete, so a run that is killed while it saves
leaves the earlier ones as they were. The position in the data needs no place here: batches are a function of seed and
step. A folder is local or on gs://.
"""

import hashlib
import itertools
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

import lpl_jax
from lpl_jax import distributed
from lpl_jax.errors import InputError, some_of_each
from lpl_jax.io.atomic import write_json
from lpl_jax.io.faults import naming
from lpl_jax.io.paths import entries, files_below, is_remote, to_path
from lpl_jax.parallel import leaf_path

PARAMS, EMA, REST, METADATA, FILES = "params", "ema_", "training", "metadata", "files.json"
WEIGHT = "lpl_weight"  # in what is saved as REST


def steps(folder) -> list[int]:
    """Steps with a complete checkpoint in `folder`, ascending; none if it does not exist."""
    folder = _absolute(folder)
    names = [path.name for path in entries(folder) if path.name.isdecimal()]
    return sorted(int(name) for name in names if ocp.utils.is_checkpoint_finalized(folder / name))


def latest_step(folder) -> int | None:
    """The newest step in `folder`, or None."""
    return max(steps(folder), default=None)


def read_metadata(folder, step: int | None = None) -> dict[str, Any]:
    """What was saved beside the state at `step` (the latest by default): the given metadata and `lpl_jax_version`."""
    path = _step_folder(folder, step)
    try:
        return json.loads((path / METADATA / METADATA).read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def fingerprint(folder, step: int | None = None) -> str:
    """Hash of what was saved at `step` (the latest by default): equal for checkpoints of the same bytes only."""
    path = _step_folder(folder, step)
    try:
        return hashlib.sha256((path / FILES).read_bytes()).hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def restore(folder, target, step: int | None = None) -> Any:
    """The state saved at `step` (the latest by default), laid out as `target` says.

    target: the result of `abstract_state`. Its mesh may be another one than that of the run which saved.
    Raises InputError where there is no such checkpoint, where it is damaged, or where its arrays are not those of the
    target; the message then names every one that differs.
    """
    path, wanted = _step_folder(folder, step), _items(target)
    names = _saved_items(path)
    _check_items(path, names, wanted)
    _verify(path)
    saved = {name: _saved_arrays(path / name) for name in names}
    emas = {name.removeprefix(EMA): saved[name] for name in saved if name.startswith(EMA)}
    _check_same(path, saved[REST] | {"params": saved[PARAMS], "emas": emas}, target)
    found = {name: _read(path / name, part) for name, part in wanted.items()}
    return found[REST].replace(params=found[PARAMS], emas={name: found[EMA + name] for name in target.emas})


def load_params(folder, weights: str = "params", *, step: int | None = None, target=None):
    """Parameters alone, for sampling or to start another run: nothing else of the checkpoint is read or checked.

    weights: "params", or the name of an average ("0.9999").
    target: tree of ShapeDtypeStructs (such as `abstract_state(...).params`) to check against, with shardings to use;
    None takes the shapes that were saved and returns numpy arrays.
    Raises InputError as `restore` does, and for a name that is not there.
    """
    path, item = _step_folder(folder, step), PARAMS if weights == "params" else EMA + weights
    _check_items(path, _saved_items(path), [item])
    _verify(path, item)
    saved = _saved_arrays(path / item)
    if target is None:
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)
    _check_same(path, saved, target)
    return _read(path / item, target)


def load_weight(folder, step: int | None = None) -> float:
    """The weight of the perceptual loss in the state saved at `step` (the latest by default); NaN: not set yet."""
    path = _step_folder(folder, step)
    _check_items(path, _saved_items(path), [REST])
    _verify(path, REST)
    saved = _saved_arrays(path / REST)
    if WEIGHT not in saved:
        raise _unreadable(path, f"{WEIGHT} missing")
    target = {WEIGHT: jax.ShapeDtypeStruct(saved[WEIGHT].shape, saved[WEIGHT].dtype)}
    return float(_read(path / REST, target)[WEIGHT])


class Checkpointer:
    """Saves the states of one run into `folder`, in the background. A context manager: leaving it waits for the last.

    start_step: the step that the run resumes from; None for a new run, whose folder must hold no checkpoints.
    keep: this many of the newest are kept; None for all.
    keep_every: those at multiples of this step are kept for good.
    metadata: plain values (such as the resolved config) saved with each.
    Raises InputError where the folder holds checkpoints that this run would come upon again.
    """

    def __init__(
        self,
        folder,
        *,
        start_step: int | None = None,
        keep: int | None = 3,
        keep_every: int | None = None,
        metadata: Mapping[str, Any] | None = None,
    ):
        for name, value in (("keep", keep), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise InputError(f"checkpoints: {name} is {value}; it must be 1 or more, or None")
        in_the_way = [step for step in steps(folder) if start_step is None or step > start_step]
        if in_the_way:
            begun = "a new run" if start_step is None else f"a run that resumes from step {start_step}"
            raise InputError(
                f"{folder} holds checkpoints of steps {_text(in_the_way)}, which {begun} would overwrite: "
                "resume from the latest, give another folder, or remove them"
            )
        policies = [LatestN(keep)] + ([EveryNSteps(keep_every)] if keep_every else [])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digest),
        )
        self._folder = _absolute(folder)
        with naming(self._folder):
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._metadata = dict(metadata or {}) | {"lpl_jax_version": lpl_jax.__version__}
        self._last = start_step

    def save(self, state, **metadata: Any) -> bool:
        """Start to save `state` under its step. Returns once it is copied to the host: it may be donated after that.

        metadata: plain values that are saved beside this state.

        False, and nothing written, where this step is the one the run began from or has just been saved.
        """
        step = int(state.step)
        if step == self._last:
            return False
        items: dict[str, Any] = {name: ocp.args.StandardSave(part) for name, part in _items(state).items()}
        items[METADATA] = ocp.args.JsonSave(self._metadata | metadata | {"step": step})
        args = ocp.args.Composite(**items)
        with naming(self._folder):
            self._manager.wait_until_finished()
            self._last = step
            return self._manager.save(step, args=args)

    def _write_digest(self) -> None:
        """In the background, when all is written and before the checkpoint gets its final name."""
        if jax.process_index() == 0:
            (path,) = (path for path in self._folder.iterdir() if path.name.split(".")[0] == str(self._last))
            write_json(path / FILES, {name: _size_and_checksum(path / name) for name in _files(path)}, indent=None)

    def wait(self) -> None:
        """Until everything is on disk. Errors of a save in the background are raised here, or by the next save."""
        with naming(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and release the threads."""
        with naming(self._folder):
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_):
        self.close()


def _step_folder(folder, step: int | None) -> epath.Path:
    available = steps(folder)
    if not available:
        raise InputError(
            f"no checkpoint in {folder}" + ("" if _absolute(folder).exists() else ", which does not exist")
        )
    step = available[-1] if step is None else step
    if step not in available:
        raise InputError(f"no checkpoint of step {step} in {folder}; there are {_text(available)}")
    return _absolute(folder) / str(step)


def _absolute(folder) -> epath.Path:
    path = to_path(folder, "a folder of checkpoints", remote=("gs",))
    return path if is_remote(path) else epath.Path(path.absolute())


def _items(state) -> dict[str, Any]:
    """A state by the names of the items that its parts are saved as."""
    emas = {EMA + name: average for name, average in state.emas.items()}
    return {PARAMS: state.params, **emas, REST: state.replace(params=None, emas=None)}


def _saved_items(path: epath.Path) -> list[str]:
    """The items of a checkpoint that hold arrays."""
    found = [entry.name for entry in entries(path)]
    if "state" in found:
        raise InputError(f"checkpoint {path} is of an earlier version, whose layout this one does not read")
    return [name for name in found if name in (PARAMS, REST) or name.startswith(EMA)]


def _saved_arrays(item: epath.Path) -> dict[str, Any]:
    """Shape and dtype of all that was saved in an item, as nested dicts, without reading any of it."""
    try:
        return ocp.PyTreeCheckpointHandler().metadata(item).tree
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(item.parent, error) from error


def _read(item: epath.Path, target):
    try:
        return ocp.PyTreeCheckpointHandler().restore(
            item,
            args=ocp.args.PyTreeRestore(
                item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
            ),
        )
    except Exception as error:  # Orbax raises a bare Exception for a chunk that cannot be read
        raise _unreadable(item.parent, error) from error


def _files(path: epath.Path) -> list[str]:
    """The files of a checkpoint's items, by their path in it, but for Orbax's marks, which come last."""
    items = [entry for entry in entries(path) if entry.is_dir()]
    names = [file.relative_to(path).as_posix() for item in items for file in files_below(item)]
    return [name for name in names if not name.endswith("/commit_success.txt")]


def _size_and_checksum(file: epath.Path) -> list[int]:
    size = checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def _verify(path: epath.Path, item: str | None = None) -> None:
    """Raises InputError, in all processes, where the files of an item (None: of all) are not those that were written.

    Each process looks at its share of them.
    """

    def check():
        try:
            expected = json.loads((path / FILES).read_text())
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        names = [name for name in expected if item is None or name.startswith(f"{item}/")]
        names.sort(key=lambda name: expected[name])  # so that every share has large and small ones
        wrong = []
        for name in names[jax.process_index() :: jax.process_count()]:
            try:
                if _size_and_checksum(path / name) != expected[name]:
                    wrong.append(f"{name} is not what was written")
            except FileNotFoundError:
                wrong.append(f"{name} is missing")
        if wrong:
            raise _unreadable(path, ", ".join(wrong))

    distributed.on_all(check)


def _unreadable(path: epath.Path, reason) -> InputError:
    others = _text(step for step in steps(path.parent) if step != int(path.name))
    reason = " ".join(str(reason).split())[:200]
    return InputError(f"checkpoint {path} is damaged: {reason}; other steps in its folder: {others}")


def _check_items(path: epath.Path, saved: Iterable[str], wanted: Iterable[str]) -> None:
    missing = [name for name in wanted if name not in saved]
    if emas := [name.removeprefix(EMA) for name in missing if name.startswith(EMA)]:
        available = _text(name.removeprefix(EMA) for name in saved if name.startswith(EMA))
        raise InputError(f"checkpoint {path} has no average of the parameters named {_text(emas)}; it has {available}")
    if missing:
        raise _unreadable(path, f"{_text(missing)} missing")


def _check_same(path: epath.Path, saved, target) -> None:
    def table(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {leaf_path(name): f"{tuple(leaf.shape)} {jax.numpy.dtype(leaf.dtype)}" for name, leaf in leaves}

    there, here = table(saved), table(target)
    problems = [
        f"{name} is {there.get(name, 'missing')} in the checkpoint and {here.get(name, 'not known')} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if problems:
        by_tree = [list(group) for _, group in itertools.groupby(problems, lambda line: line.partition("/")[0])]
        raise InputError(f"checkpoint {path} does not fit: {some_of_each(*by_tree)}")


def _text(values) -> str:
    return ", ".join(str(value) for value in values) or "none"
