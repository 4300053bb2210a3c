"""Whether what two programs have left is the same, bit for bit, but for times: runs, stores, samples, result cards.

For `benchmarks.kills`. Folders are compared file by file; checkpoints by their arrays, TensorBoard's events by what
TensorBoard shows of them, and metrics and cards without the seconds and dates in them.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Keys whose values are times, and of a checksum over them.
TIMED = ("images_per_second", "seconds", "date", "started", "created", "checksum")
DATED = b"| date |"  # a line of a result card
EVENTS = "events.out.tfevents"
LEFTOVERS = (".partial", ".lock", "tmp")  # in names: of a write that was not finished


def differences(folder: Path, twin: Path) -> list[str]:
    """What is not the same in a folder and its undisturbed twin, in words."""
    found = leftovers(folder)
    ours, theirs = (set(_plain_files(each)) for each in (folder, twin))
    found += [f"{name} is not in the twin" for name in sorted(ours - theirs)]
    found += [f"{name} is missing" for name in sorted(theirs - ours)]
    found += [f"{name} differs" for name in sorted(ours & theirs) if not _same(folder / name, twin / name)]
    for run in sorted({path.parent for path in twin.rglob("checkpoints")}):
        found += run_differences(folder / run.relative_to(twin), run)
    return found


def leftovers(folder: Path) -> list[str]:
    """Files that only a write which was not finished has."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    return [f"{name} was left" for name in sorted(names) if any(part in name.split("/")[-1] for part in LEFTOVERS)]


def run_differences(run: Path, twin: Path) -> list[str]:
    """Of checkpoints and TensorBoard's events."""
    from lpl_jax.runs import checkpoints

    found, steps = [], checkpoints.steps(twin / "checkpoints")
    if checkpoints.latest_step(run / "checkpoints") != steps[-1]:
        return [f"{run.name}: the newest checkpoint is of step {checkpoints.latest_step(run / 'checkpoints')}"]
    if names := [path.name for path in (run / "checkpoints").iterdir() if not path.name.isdecimal()]:
        found.append(f"{run.name}/checkpoints holds {names}")
    for step in set(steps) & set(checkpoints.steps(run / "checkpoints")):
        ours, theirs = (dict(arrays(each / "checkpoints" / str(step))) for each in (run, twin))
        if ours.keys() != theirs.keys():
            found.append(f"{run.name}: step {step} has other arrays")
        else:
            changed = [name for name in ours if not _equal(ours[name], theirs[name])]
            found += [f"{run.name}: step {step}: {name} differs" for name in changed]
        ours, theirs = (_timeless(checkpoints.read_metadata(each / "checkpoints", step)) for each in (run, twin))
        if ours != theirs:
            found.append(f"{run.name}: step {step}: metadata differ")
    ours, theirs = shown_events(run), shown_events(twin)
    found += [
        f"{run.name}: event {name} {count} times"
        for name, count in Counter(key for key, _ in ours).items()
        if count > 1
    ]
    if sorted(ours) != sorted(theirs):
        changed = sorted({key for key, _ in set(ours) ^ set(theirs)})
        found.append(f"{run.name}: {len(changed)} events differ, first {changed[0]}")
    return found


def arrays(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """All arrays of a checkpoint by their path, as they were saved."""
    import jax
    import orbax.checkpoint as ocp

    from lpl_jax.parallel import leaf_path

    for item in sorted(checkpoint.iterdir()):
        if item.is_dir() and item.name != "metadata":
            tree = ocp.PyTreeCheckpointHandler().restore(
                item, args=ocp.args.PyTreeRestore(restore_args=_as_numpy(item))
            )
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                yield f"{item.name}/{leaf_path(path)}", np.asarray(leaf)


def _as_numpy(item: Path):
    import jax
    import orbax.checkpoint as ocp

    saved = ocp.PyTreeCheckpointHandler().metadata(item).tree
    return jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)


def events(file: Path) -> Iterator[Any]:
    """The events of a file, up to where a kill cut it short."""
    from tensorboardX.proto.event_pb2 import Event

    data = file.read_bytes()
    while len(data) >= 12:  # 8 bytes of length, 4 of its checksum, the record, 4 of its checksum
        end = 12 + int.from_bytes(data[:8], "little")
        if len(data) < end + 4:
            return
        yield Event.FromString(data[12:end])
        data = data[end + 4 :]


def shown_events(folder: Path) -> list[tuple[tuple[int, str], bytes]]:
    """((step, tag), value) of what TensorBoard shows: a session that starts at a step takes back all from it on."""
    shown: list[tuple[tuple[int, str], bytes]] = []
    for file in sorted(folder.glob(f"{EVENTS}*")):
        for event in events(file):
            if event.HasField("session_log"):
                shown = [entry for entry in shown if entry[0][0] < event.step]
            for value in event.summary.value:
                if value.tag not in TIMED:
                    shown.append(((event.step, value.tag), value.SerializeToString(deterministic=True)))
    return shown


def _plain_files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and "checkpoints/" not in name and not path.name.startswith(EVENTS):
            yield name


def _same(file: Path, other: Path) -> bool:
    if file.name == "startup.jsonl":  # a line for each start, and each program
        return all("seconds" in json.loads(line) for line in file.read_text().splitlines())
    if file.suffix in (".json", ".jsonl"):
        ours, theirs = ([json.loads(text) for text in _documents(each)] for each in (file, other))
        return _timeless(ours) == _timeless(theirs)
    ours, theirs = (
        [line for line in each.read_bytes().split(b"\n") if not line.startswith(DATED)] for each in (file, other)
    )
    return ours == theirs


def _documents(file: Path) -> list[str]:
    text = file.read_text()
    return text.splitlines() if file.suffix == ".jsonl" else [text]


def _timeless(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _timeless(value) for name, value in content.items() if name not in TIMED}
    return [_timeless(value) for value in content] if isinstance(content, list) else content


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
