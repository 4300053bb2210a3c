"""Checkpoints of the train state, written by Orbax while training goes on.

    folder/<step>/params/      the parameters, every array with its own shape and dtype
    folder/<step>/ema_<name>/  each average of them
    folder/<step>/training/    all else of the `TrainState`: step, optimizer's state, weight of the perceptual loss
    folder/<step>/metadata/    JSON: what the run was (its config) and which version wrote it
    folder/<step>/files.json   size and CRC-32 of each file, checked before anything is read: see `checkpoint_files`

What is read alone has files of its own, so that no more than these are read and checked; several processes share the
checking. A checkpoint appears under its final name only when it is complete and was read back from the disk as it was
in memory; older ones are removed only after that. So a run that is killed while it saves, or whose disk fails, leaves
the earlier ones as they were. The position in the data needs no place here: batches are a function of seed and step. A
folder is local or on gs://.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

import lpl_jax
from lpl_jax import distributed
from lpl_jax.errors import InputError, some, some_of_each
from lpl_jax.io.faults import naming
from lpl_jax.io.jsons import read_json
from lpl_jax.io.paths import entries, is_remote, to_path
from lpl_jax.io.places import Place
from lpl_jax.parallel import leaf_path
from lpl_jax.runs import checkpoint_files
from lpl_jax.runs.checkpoint_files import FILES

PARAMS, EMA, REST, METADATA = "params", "ema_", "training", "metadata"
DAMAGED = ".damaged"  # after the step of a checkpoint that was set aside
TMP = ocp.utils.TMP_DIR_SUFFIX
GROUP = 2**30  # bytes of arrays that are read back at a time
WEIGHT = "lpl_weight"  # in what is saved as REST


def steps(folder) -> list[int]:
    """Steps with a complete checkpoint in `folder`, ascending; none if it does not exist."""
    folder = _absolute(folder)
    names = [path.name for path in entries(folder) if _is_step(path.name)]
    return sorted(int(name) for name in names if ocp.utils.is_checkpoint_finalized(folder / name))


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def latest_step(folder) -> int | None:
    """The newest step in `folder`, or None."""
    return max(steps(folder), default=None)


def read_metadata(folder, step: int | None = None) -> dict[str, Any]:
    """What was saved beside the state at `step` (the latest by default): the given metadata and `lpl_jax_version`."""
    path = _step_folder(folder, step)
    if wrong := checkpoint_files.faults(path, METADATA):
        raise _unreadable(path, some(wrong))
    try:
        found = read_json(path / METADATA / METADATA, finite=False)  # a tau may be infinite
    except InputError as error:
        raise _unreadable(path, error) from error
    if found.get("step") != int(path.name):
        raise _unreadable(path, f"{METADATA} is not of step {path.name}")
    return found


def fingerprint(folder, step: int | None = None) -> str:
    """Hash of what was saved at `step` (the latest by default): equal for checkpoints of the same bytes only."""
    path = _step_folder(folder, step)
    try:
        checkpoint_files.read_list(path)
        return hashlib.sha256((path / FILES).read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def restore(folder, target, step: int | None = None) -> Any:
    """The state saved at `step` (the latest by default), laid out as `target` says.

    target: the result of `abstract_state`. Its mesh may be another one than that of the run which saved.
    Raises InputError where there is no such checkpoint, where it is damaged, or where its arrays are not those of the
    target; the message then names every one that differs.
    """
    path, wanted = _step_folder(folder, step), _items(target)
    names = _saved_items(path)
    _check_items(path, names, wanted, _resume)
    _verify(path, advice=_resume)
    read_metadata(folder, int(path.name))
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


def set_damaged_aside(folder, say: Callable[[str], None] = lambda text: None) -> None:
    """Gives checkpoints that are newer than the last good one other names, so that the good one is the newest.

    Nothing is removed: what was at FOLDER/3 is at FOLDER/3.damaged. say: told of each. All processes call it.
    Raises InputError, and changes nothing, where no checkpoint is good.
    """
    folder, damaged = _absolute(folder), []
    for step in reversed(steps(folder)):
        try:
            _verify(folder / str(step), advice=_resume)
            break
        except InputError as error:
            damaged.append((step, error))
    else:
        if damaged:
            raise damaged[0][1]
    for step, error in damaged:
        reason = str(error).partition(" is damaged: ")[2].partition("; other steps")[0]
        distributed.on_first(lambda step=step, reason=reason: say(_set_aside(folder / str(step), reason)))


def _set_aside(path: epath.Path, reason: str) -> str:
    names = (f"{path.name}{DAMAGED}{f'-{number}' if number else ''}" for number in itertools.count())
    aside = next(path.parent / name for name in names if not (path.parent / name).exists())
    with naming(path):
        path.rename(aside)
    return f"checkpoint {path} is damaged ({reason}): it is set aside as {aside.name}"


class Checkpointer:
    """Saves the states of one run into `folder`, in the background. A context manager: leaving it waits for the last.

    A checkpoint gets its name, and older ones are removed, when it was read back and is what was in memory.

    start_step: the step that the run resumes from; None for a new run, whose folder must hold no checkpoints.
    keep: this many of the newest are kept; None for all.
    keep_every: those at multiples of this step are kept for good.
    metadata: plain values (such as the resolved config) saved with each.
    Raises InputError where the folder holds checkpoints that this run would come upon again; in a save or a wait, where
    what was written is not what was to be, or the folder is no longer there.
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
            lightweight_initialize=True,  # an older checkpoint that is damaged is no matter
            async_options=ocp.AsyncOptions(post_finalization_callback=self._finish),
        )
        self._folder = _absolute(folder)
        with naming(self._folder):
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._place, self._sums = Place(self._folder), {}
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
        with self._naming():
            self._manager.wait_until_finished()
            self._place.check()
            self._last, self._sums = step, {name: _sums(part) for name, part in _items(state).items()}
            return self._manager.save(step, args=args)

    def _finish(self) -> None:
        """In the background, when all is written and before the checkpoint gets its final name.

        An error here leaves it without the name: what was the newest checkpoint stays so.
        """
        if jax.process_index() != 0:
            return
        self._place.check()
        final = self._folder / str(self._last)
        (path,) = (
            path for path in self._folder.iterdir() if path == final or path.name.startswith(f"{final.name}{TMP}")
        )
        checkpoint_files.forget_cached(path)
        for item, sums in self._sums.items():
            if wrong := [name for name, value in _sums_on_disk(path / item) if sums.pop(name, None) != value] + [*sums]:
                raise InputError(
                    f"checkpoint {final} was not written as it was in memory ({item}: {some(wrong)}); it is not kept, "
                    f"those before it are: {_text(steps(self._folder))}"
                )
        checkpoint_files.write_list(path, final)

    def wait(self) -> None:
        """Until everything is on disk. Errors of a save in the background are raised here, or by the next save."""
        with self._naming():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and release the threads."""
        with self._naming():
            try:
                self._manager.close()
            finally:
                self._place.close()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """As `naming`; of a folder that is gone meanwhile, that is said in place of what Orbax makes of it."""
        try:
            with naming(self._folder):
                yield
        except Exception as error:
            try:
                self._place.check()
            except InputError as gone:
                raise gone from error
            raise

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


def _sums(tree) -> dict[str, int]:
    """By the path of an array: the sum of its bits, taken as whole numbers, modulo 2^32; of all processes."""
    leaves = {leaf_path(name): leaf for name, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    sums = np.array([_sum(leaf) for leaf in leaves.values()], np.uint32)
    if jax.process_count() > 1:
        sums = np.asarray(multihost_utils.process_allgather(sums)).sum(0, np.uint32)
    return dict(zip(leaves, map(int, sums), strict=True))


def _sum(array) -> int:
    """Of the parts that this process is the first to hold."""
    shards = [each.data for each in array.addressable_shards if each.replica_id == 0]
    return sum(_sum_of_bits(np.asarray(shard)) for shard in shards) % 2**32


def _sum_of_bits(array: np.ndarray) -> int:
    words = np.ascontiguousarray(array).reshape(-1).view(f"u{min(array.itemsize, 4)}")
    return int(words.sum(dtype=np.uint32))


def _sums_on_disk(item: epath.Path) -> Iterator[tuple[str, int]]:
    """As `_sums`, of what an item holds, read a part at a time."""
    leaves, tree = jax.tree.flatten(_saved_arrays(item))
    ends = itertools.accumulate(leaf.dtype.itemsize * int(np.prod(leaf.shape)) for leaf in leaves)
    turns = [end // GROUP for end in ends]
    for turn in sorted(set(turns)):
        wanted = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if of == turn else ocp.PLACEHOLDER
            for leaf, of in zip(leaves, turns, strict=True)
        ]
        for name, array in jax.tree_util.tree_leaves_with_path(_read(item, tree.unflatten(wanted))):
            if array is not ocp.PLACEHOLDER:
                yield leaf_path(name), _sum_of_bits(array)


def _choose(good: int) -> str:
    return f"step {good} is good: --checkpoint {good} takes it (--config.train.init_step={good} to start from it)"


def _resume(good: int) -> str:
    return f"step {good} is good: the same command with --config.checkpoint.on-damage=previous goes on from it"


def _verify(path: epath.Path, item: str | None = None, advice: Callable[[int], str] = _choose) -> None:
    """Raises InputError, in all processes, where the files of an item (None: of all) are not those that were written.

    Each process looks at its share of them. advice: what to do where this step is good.
    """

    def check():
        if wrong := checkpoint_files.faults(path, item, jax.process_index(), jax.process_count()):
            raise _unreadable(path, some(wrong), advice)

    distributed.on_all(check)


def _unreadable(path: epath.Path, reason, advice: Callable[[int], str] = _choose) -> InputError:
    """What is said of a damaged checkpoint: with the other steps, and which of them is the newest good one."""
    others = [step for step in steps(path.parent) if step != int(path.name)]
    # From those before it, as a run that goes on would; only then from later ones.
    order = sorted(others, key=lambda step: (step > int(path.name), -step))
    good = next((step for step in order if not checkpoint_files.faults(path.parent / str(step))), None)
    end = "" if not others else "; none of them is good" if good is None else f"; {advice(good)}"
    reason = " ".join(str(reason).split())[:200]
    return InputError(f"checkpoint {path} is damaged: {reason}; other steps in its folder: {_text(others)}{end}")


def _check_items(
    path: epath.Path, saved: Iterable[str], wanted: Iterable[str], advice: Callable[[int], str] = _choose
) -> None:
    missing = [name for name in wanted if name not in saved]
    if emas := [name.removeprefix(EMA) for name in missing if name.startswith(EMA)]:
        available = _text(name.removeprefix(EMA) for name in saved if name.startswith(EMA))
        raise InputError(f"checkpoint {path} has no average of the parameters named {_text(emas)}; it has {available}")
    if missing:
        raise _unreadable(path, f"{_text(missing)} missing", advice)


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
