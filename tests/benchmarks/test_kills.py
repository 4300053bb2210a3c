"""Programs that are killed: the harness in miniature, and that it is not blind."""

import json
import shutil

import numpy as np
import pytest

from benchmarks import kills
from benchmarks.same_files import differences, shown_events
from lpl_jax.training.logging import MetricLogger


def test_a_prepare_that_is_killed_leaves_the_store_of_one_that_is_not(tmp_path):
    """A handful of kills; the long form is a command."""
    found = kills.run(2, 15, ["prepare"], tmp_path / "kills.json", tmp_path, jobs=1, twins=1)
    assert found["summary"]["problems"] == [] and found["summary"]["kills"] >= 2
    assert json.loads((tmp_path / "kills.json").read_text()) == found


@pytest.mark.slow
def test_programs_that_are_killed_leave_what_undisturbed_ones_do(tmp_path):
    found = kills.run(12, 1, list(kills.COMMANDS), tmp_path / "kills.json", tmp_path)
    assert found["summary"]["problems"] == [] and found["summary"]["kills"] >= 12
    assert (found["summary"]["longest_seconds_to_end"] or 0) < kills.LONGEST


@pytest.fixture
def twins(tmp_path):
    """Two folders of the same, but for times."""
    for name, seconds in (("one", 1), ("other", 2)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 0.5, "images_per_second": {seconds}}}\n')
        (folder / "card.md").write_text(f"| cfd | 3 |\n| date | {seconds} |\n")
        (folder / "shard").write_bytes(b"abc")
    return tmp_path / "one", tmp_path / "other"


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("shard", b"abd", "shard differs"),
        ("metrics.jsonl", b'{"step": 1, "loss": 0.25}\n', "metrics.jsonl differs"),
        ("card.md", b"| cfd | 4 |\n", "card.md differs"),
        (".x.1-2.partial", b"", ".x.1-2.partial was left"),
        (".lock", b"", ".lock was left"),
        ("more", b"", "more is not in the twin"),
    ],
)
def test_what_differs_is_found(twins, name, content, said):
    assert differences(*twins) == []
    (twins[0] / name).write_bytes(content)
    assert differences(*twins)[0] == said


def test_events_are_those_that_tensorboard_shows(tmp_path):
    """The same with a kill in between, which has cut the last event short, as without."""
    for name, stops in (("one", [4]), ("other", [4, 2])):
        for number, (start, last) in enumerate([(None, stops[0]), *((2, 4) for _ in stops[1:])]):
            with MetricLogger(tmp_path / name, start_step=start) as logger:
                for step in range((start or 0) + 1, last + 1):
                    logger.write(step, {"loss": step / 2})
            (file,) = (each for each in (tmp_path / name).glob("events*") if each.name.endswith(f".{start or 0}"))
            if number < len(stops) - 1:
                file.write_bytes(file.read_bytes()[:-9])
    one, other = (shown_events(tmp_path / name) for name in ("one", "other"))
    assert one == other and [key for key, _ in one] == [(step, "loss") for step in range(1, 5)]
    shutil.rmtree(tmp_path / "one")
    with MetricLogger(tmp_path / "one") as logger:
        logger.image(1, "samples", np.zeros((2, 2, 3), np.uint8))
    assert [key for key, _ in shown_events(tmp_path / "one")] == [(1, "samples")]
