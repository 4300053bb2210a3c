"""The same seed and layout give the same bits: of runs of the quickstart's model, of stores, and of samples.

What may change without changing a bit is changed here, and what changes the rounding alone is held to it.
"""

import functools
import itertools
import math
import os
import signal

import chex
import jax
import numpy as np
import pytest

from lpl_jax import autoencoders, parallel
from lpl_jax.configs import quickstart
from lpl_jax.data import FolderSource, PhotoSource, write_store
from lpl_jax.experiment import build
from lpl_jax.runs import open_run
from lpl_jax.training import data, loop, train
from lpl_jax.training.logging import read_metrics

SIDE, STEPS = 64, 4
SPEED = "images_per_second"


@pytest.fixture(scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        make = parallel.make_mesh
        patch.setattr(parallel, "make_mesh", lambda config, devices=None: make(config, devices or jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The quickstart's store with a crop of each photograph."""
    folder = tmp_path_factory.mktemp("photos") / "latents"
    write_store(folder, PhotoSource(SIDE, crops=1), autoencoders.load("bundled"), batch_size=8)
    return folder


@pytest.fixture(scope="module")
def small_quickstart(photos):
    """function(arguments, **changes) -> the quickstart's own experiment, for a few small batches."""

    def make(arguments="", **changes):
        c = quickstart.get_config(arguments)
        c.data.store, c.train.batch_size, c.train.steps, c.train.log_every = str(photos), 4, STEPS, 1
        c.train.checkpoint_every, c.sampling.steps = STEPS, 2
        for name, value in changes.items():
            section, _, field = name.partition("__")
            c[section][field] = value
        return build(c)

    return make


@pytest.fixture(scope="module")
def whole(small_quickstart, one_device, tmp_path_factory):
    """A run in one go: (folder, its last state on the host)."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, jax.device_get(train(small_quickstart(), folder).state)


def rows(folder):
    """Step -> its row of metrics, but for the speed."""
    return {row["step"]: row | {SPEED: None} for row in read_metrics(folder)}


def stop_at(step, patch):
    """The next run is asked to stop in that step, counted from its start."""
    put, calls = parallel.put_batch, itertools.count(1)

    def interrupted(batch, mesh):
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(batch, mesh)

    patch.setattr(loop.parallel, "put_batch", interrupted)


def test_a_run_is_the_same_bit_for_bit_whatever_is_written_read_ahead_and_stopped(
    whole, small_quickstart, tmp_path, monkeypatch
):
    """Everything at once: lines, checkpoints, how many are kept, threads that read, and a stop in its second step."""
    changed = small_quickstart(train__log_every=3, train__checkpoint_every=1, train__keep=1, train__keep_every=3)
    monkeypatch.setattr(data, "batches", functools.partial(data.batches, read_threads=1, read_ahead=7))
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        assert train(changed, tmp_path / "run").step == 2
    result = train(changed, tmp_path / "run")
    assert result.step == STEPS
    chex.assert_trees_all_equal(jax.device_get(result.state), whole[1])


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["", "lpl"])
def test_the_same_call_gives_the_same_bits(arguments, small_quickstart, one_device, tmp_path):
    gate = dict(lpl__tau=math.inf, lpl__tau_ref_resolution=SIDE, loss__lpl_capacity="4")
    changes = gate | dict(loss__lpl_start=1, loss__calibration_batches=1) if arguments else {}
    states = [train(small_quickstart(arguments, **changes), tmp_path / name).state for name in ("a", "b")]
    chex.assert_trees_all_equal(*map(jax.device_get, states))
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(train__log_every=2),
        dict(train__checkpoint_every=1),
        dict(train__keep=1, train__checkpoint_every=1),
        dict(train__max_nonfinite=1),
        dict(evaluation__every=2, evaluation__every_images=4, evaluation__batch_size=2),
    ],
    ids=str,
)
def test_what_is_written_changes_no_bit(changes, whole, small_quickstart, tmp_path):
    state = train(small_quickstart(**changes), tmp_path / "run").state
    chex.assert_trees_all_equal(jax.device_get(state), whole[1])


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_stop_at_any_step_changes_no_bit(step, whole, small_quickstart, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        assert train(small_quickstart(), tmp_path / "run").step == step
    state = train(small_quickstart(), tmp_path / "run").state
    chex.assert_trees_all_equal(jax.device_get(state), whole[1])
    assert rows(tmp_path / "run") == rows(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(mesh__data=2),
        dict(mesh__data=1, mesh__fsdp=2),
        dict(mesh__data=1, mesh__tensor=2),
    ],
    ids=str,
)
def test_another_layout_changes_the_rounding_alone(changes, whole, small_quickstart, tmp_path, monkeypatch):
    make = parallel.make_mesh
    monkeypatch.setattr(parallel, "make_mesh", lambda config, _=None: make(config, jax.devices()[:2]))
    train(small_quickstart(**changes), tmp_path / "run")
    found, expected = rows(tmp_path / "run"), rows(whole[0])
    for step in range(1, STEPS + 1):
        assert found[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5), step


@pytest.mark.slow
def test_samples_are_the_same_bit_for_bit_and_in_other_batches_up_to_rounding(whole):
    run = open_run(whole[0])
    first, again = (run.sampler(batch_size=4)([0, 1, 2, 3]) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = run.sampler(batch_size=2)([0, 1, 2, 3])
    assert np.abs(first.astype(int) - other.astype(int)).max() <= 1


def files(folder):
    """Name -> bytes of all files of a store."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_store_is_the_same_byte_for_byte_whoever_reads_and_however_many_hosts_write(
    image_folder, tiny_folder, tmp_path
):
    source, autoencoder = FolderSource(image_folder, 32), autoencoders.load(tiny_folder)
    write = functools.partial(write_store, source=source, autoencoder=autoencoder, shard_records=8, batch_size=8)
    write(tmp_path / "a", read_threads=1)
    write(tmp_path / "b", read_threads=6)
    for host in (1, 0):
        write(tmp_path / "hosts", host_index=host, host_count=2)
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "hosts")
