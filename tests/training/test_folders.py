"""The folder of a run, and its disk, while it trains: what is damaged, full, removed or cut short is said in a line."""

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

import lpl_jax
from lpl_jax.data import LatentStore
from lpl_jax.errors import InputError
from lpl_jax.experiment import build
from lpl_jax.io.faults import explain
from lpl_jax.runs import checkpoints
from lpl_jax.tools import cli, config_file
from lpl_jax.training import step, train
from lpl_jax.training.logging import read_metrics
from lpl_jax.training.metrics import Recorder

ROOT = Path(lpl_jax.__file__).parents[1]
pytestmark = pytest.mark.usefixtures("two_devices", "small")


def small_step(state, batch, key, frozen, **_):
    """In place of `train_step`, which takes long to compile."""
    moment = jnp.mean(batch["mean"] * (1 + batch["label"])[:, None, None, None])
    params = jax.tree.map(lambda leaf: leaf + moment, state.params)
    return state.replace(step=state.step + 1, params=params), {"loss": moment}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(step, "train_step", small_step)


@pytest.fixture
def at_step(monkeypatch):
    """function(step, what): `what` is called once, when a run has begun this step."""

    def install(number, what):
        push = Recorder.push

        def spy(self, step, metrics):
            push(self, step, metrics)
            if step == number:
                monkeypatch.setattr(Recorder, "push", push)
                what()

        monkeypatch.setattr(Recorder, "push", spy)

    return install


def wait_for_a_checkpoint(workdir):
    while not checkpoints.steps(workdir / "checkpoints"):
        time.sleep(0.01)


def flip(folder):
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def as_told(message, config):
    """The experiment of the config with the flag that a message names."""
    (flag,) = (word for word in message.split() if word.startswith("--config."))
    return build(config_file.override(config, [flag]))


def test_a_run_goes_on_from_the_last_good_checkpoint_by_the_flag_that_its_message_names(tmp_path, tiny_config, capsys):
    config, workdir = tiny_config(), tmp_path / "run"
    undisturbed = train(build(config), workdir)
    rows = read_metrics(workdir)
    flip(workdir / "checkpoints/6")
    with pytest.raises(
        InputError, match="checkpoints/6 is damaged: .*; step 3 is good: the same command with"
    ) as error:
        train(build(config), workdir)
    assert checkpoints.steps(workdir / "checkpoints") == [3, 6], "nothing is changed unless that is asked for"
    again = train(as_told(str(error.value), config), workdir)
    assert f"checkpoint {workdir}/checkpoints/6 is damaged (" in capsys.readouterr().out
    chex.assert_trees_all_equal(again.state, undisturbed.state)
    found = read_metrics(workdir)
    assert [row | {"images_per_second": 0} for row in found] == [row | {"images_per_second": 0} for row in rows]
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6", "6.damaged"]
    train(build(tiny_config()), workdir)  # either way is the same run


@pytest.mark.parametrize("change", ["removed", pytest.param("renamed", marks=pytest.mark.slow)])
def test_a_run_whose_folder_is_gone_ends(change, tmp_path, tiny_config, at_step):
    workdir = tmp_path / "run"

    def gone():
        wait_for_a_checkpoint(workdir)
        shutil.rmtree(workdir) if change == "removed" else workdir.rename(tmp_path / "other")

    at_step(5, gone)
    with pytest.raises(InputError, match=f"{workdir} was {change}.* while files were written there"):
        train(build(tiny_config()), workdir)
    assert not workdir.exists()
    if change == "renamed":
        assert checkpoints.steps(tmp_path / "other/checkpoints") == [3]


@pytest.mark.slow
def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(tmp_path, tiny_config, at_step):
    """A limit on the size of files stands for the disk: the system refuses the write in the same way."""
    config, workdir, limits = tiny_config(), tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def full():
        wait_for_a_checkpoint(workdir)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    at_step(5, full)
    try:
        with pytest.raises(Exception) as error:  # Orbax's, of many types
            train(build(config), workdir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line, status = explain(error.value)
    assert line.startswith(f"File too large: {workdir}") and status == 2
    assert checkpoints.steps(workdir / "checkpoints") == [3]
    chex.assert_trees_all_equal(train(build(config), workdir).state, train(build(config), tmp_path / "other").state)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6"]
    assert [row["step"] for row in read_metrics(workdir)] == [2, 4, 6]


def test_a_store_that_is_cut_short_meanwhile_is_named_with_record_and_shard(stores):
    """ArrayRecord then gives records without bytes, and no error."""
    store = LatentStore(stores[32])
    store._shards[0].source = [bytes(10**6), b""]
    with pytest.raises(InputError, match=r"record 1 cannot be read \(latents-00000-of-00001\S+: it has 0 of"):
        store.fixed([0, 1])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda store: os.truncate(next(store.glob("*.array_record")), 100), "has 100 bytes instead of"),
        (shutil.rmtree, "is missing"),
    ],
    ids=["cut short", "removed"],
)
def test_a_store_that_is_harmed_meanwhile_ends_the_run_at_its_next_checkpoint(
    harm, words, tmp_path, tiny_config, stores, at_step
):
    """What was read ahead would last for a while, and hide it."""
    shutil.copytree(stores[32], tmp_path / "store")
    at_step(4, lambda: harm(tmp_path / "store"))
    with pytest.raises(InputError, match=f"{tmp_path / 'store'}: shard .* {words}"):
        train(build(tiny_config(data__store=str(tmp_path / "store"))), tmp_path / "run")
    assert checkpoints.steps(tmp_path / "run/checkpoints") == [3]


@pytest.mark.parametrize("verb", [
    "train --config quickstart --workdir {}", "prepare --source photos --resolution 64 --out {}",
    "quickstart --workdir {}", "sample --workdir {} --label 1", "eval --workdir {}", "export --workdir {} --out x",
    "sweep --rows table3_* --stores x --workdir {}",
])  # fmt: skip
def test_a_file_in_place_of_a_folder_is_said_by_every_verb(verb, tmp_path, capsys):
    from lpl_jax.tools import verbs

    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "run"):
        with pytest.raises(SystemExit) as caught:
            cli.run_main(verbs.main, verb.format(path).split(), keep_programs=False)
        error = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2 and f"{file} is a file: give a folder" in error[-1], error
    assert file.read_text() == "mine"


def test_a_damaged_list_of_classes_is_said(tmp_path, tiny_config):
    config, workdir = tiny_config(), tmp_path / "run"
    train(build(config), workdir)
    (workdir / "classes.json").write_text('["ant"]')  # as earlier versions wrote it
    with pytest.raises(InputError, match=r"classes.json has 1 classes, latent store .* has 2"):
        train(build(config), workdir)


FULL = """
mount -t tmpfs -o size=200k none {room} && cd {root} || exit 77
{python} -m lpl_jax prepare --source photos --crops 40 --resolution 64 --out {room}/store; echo "status $?"
ls -A {room}
mount -o remount,size=200m {room}
{python} -m lpl_jax prepare --source photos --crops 40 --resolution 64 --out {room}/store; echo "status $?"
mount -o remount,ro {room}
{python} -m lpl_jax prepare --source photos --crops 4 --resolution 64 --out {room}/other; echo "status $?"
"""


@pytest.mark.slow
def test_a_full_disk_and_one_that_is_read_only(tmp_path):
    """On a file system of their own, where the system lets a user mount one."""
    room = tmp_path / "room"
    room.mkdir()
    script = FULL.format(room=room, root=ROOT, python=sys.executable)
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=300)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no file system can be mounted here")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr and len(errors) == 2, done.stderr
    assert f"No space left on device: {room}/store" in errors[0]
    assert f"--out {room}/other: {room} may not be written into" in errors[1]
    assert [line for line in done.stdout.splitlines() if line.startswith("status")] == [
        "status 2",
        "status 0",
        "status 2",
    ]


TWO = {
    "prepare": "prepare --source photos --crops 30 --resolution 64 --out {}",
    "train": "train --config quickstart --workdir {} --config.train.steps=2 --config.data.crops=8",
    "quickstart": "quickstart --workdir {} --config.train.steps=2",
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", TWO)
def test_of_two_jobs_in_one_new_folder_the_second_is_refused_and_the_first_is_whole(verb, tmp_path):
    """Real programs, started together. The first one is not waited for where it would compile for minutes."""
    folder = tmp_path / "new/run"
    command = [sys.executable, "-m", "lpl_jax", *TWO[verb].format(folder).split()]
    jobs = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        end = time.monotonic() + 120
        while all(job.poll() is None for job in jobs):
            assert time.monotonic() < end
            time.sleep(0.05)
        (second,) = (job for job in jobs if job.poll() is not None)
        (first,) = (job for job in jobs if job is not second)
        assert second.returncode == 2
        assert f"in use by process {first.pid} (lpl {verb} of this host)" in second.stderr.read()
        if verb == "prepare":
            assert first.wait(200) == 0, first.stderr.read()
            subprocess.run([sys.executable, "-m", "lpl_jax", "store", "verify", str(folder)], check=True, cwd=ROOT)
        else:
            assert first.poll() is None
    finally:
        for job in jobs:
            job.kill()
