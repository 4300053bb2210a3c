"""Numbers that are not finite: what they leave alone, what is said of them, and where they are refused."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from lpl_jax import autoencoders, denoisers
from lpl_jax.data import store as stores_module
from lpl_jax.errors import InputError
from lpl_jax.experiment import build
from lpl_jax.losses import gate
from lpl_jax.runs import checkpoints, open_run
from lpl_jax.runs.workdir import Inputs, write_config
from lpl_jax.training import data as run_data
from lpl_jax.training import nonfinite, train
from lpl_jax.training import step as step_module
from lpl_jax.training.logging import read_metrics
from lpl_jax.training.metrics import MetricBuffer, Recorder

pytestmark = pytest.mark.usefixtures("two_devices")


@pytest.fixture
def one_bad_record(monkeypatch):
    """Record 5 of a store is read with a NaN in its latent."""
    original = stores_module.LatentStore.fixed

    def fixed(self, indices):
        records = original(self, indices).copy()
        records["moments"][np.asarray(indices) == 5] = np.nan
        return records

    monkeypatch.setattr(stores_module.LatentStore, "fixed", fixed)


def test_a_bad_record_is_named_and_the_state_is_that_of_a_run_that_left_the_step_out(
    one_bad_record, tiny_config, tmp_path, capfd
):
    """Batches of 8 from 16 records: one step of two has it."""
    config = tiny_config(train__steps=4, train__log_every=1)
    result = train(build(config), tmp_path)
    rows = read_metrics(tmp_path)
    assert [row["nonfinite"] for row in rows].count(1) == 2
    for row in rows:
        assert (row["loss"] is None) == (row["nonfinite"] == 1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(result.state.params)))
    key = open_run(tmp_path).experiment.data.store
    key = stores_module.LatentStore(key)[5].key
    said = capfd.readouterr().out
    assert said.count("is not finite and changed nothing: logvar, mean of records " + key) == 2


def test_a_run_ends_after_so_many_in_a_row_and_keeps_its_last_good_checkpoint(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(train__steps=20, train__log_every=2, train__checkpoint_every=3)
    train(build(tiny_config(train__steps=6, train__log_every=2, train__checkpoint_every=3)), tmp_path)
    before = open_run(tmp_path).params(step=6)
    original = stores_module.LatentStore.fixed

    def fixed(self, indices):
        records = original(self, indices).copy()
        records["moments"] = np.inf
        return records

    monkeypatch.setattr(stores_module.LatentStore, "fixed", fixed)
    with pytest.raises(InputError, match=r"step 7 .*; 3 steps in a row \(train.max_nonfinite\), up to step 9"):
        train(build(config), tmp_path)
    assert checkpoints.steps(tmp_path / "checkpoints") == [3, 6]
    chex.assert_trees_all_equal(open_run(tmp_path).params(), before)


@pytest.mark.slow
def test_the_first_tap_that_is_not_finite_is_named(tiny_config, with_lpl, tmp_path, monkeypatch):
    original = gate.decoded_distance

    def broken(*args, **kwargs):
        loss, taps, decoded = original(*args, **kwargs)
        return loss * jnp.nan, taps._replace(term=taps.term.at[:, 1].set(jnp.nan)), decoded

    monkeypatch.setattr(gate, "decoded_distance", broken)
    config = tiny_config(train__steps=4, train__log_every=1, train__max_nonfinite=1, lpl__taps=2, **with_lpl)
    with pytest.raises(InputError, match=r"step 1 is not finite and changed nothing: lpl/up_0/term; records "):
        train(build(config), tmp_path)
    assert checkpoints.steps(tmp_path / "checkpoints") == []


@pytest.fixture
def edited(tiny_config, tmp_path):
    """function(edit) -> weights in a file, those of a fresh network after `edit` of the arrays by name."""

    def make(edit):
        model = dataclasses.replace(build(tiny_config()).model, latent_channels=4)
        denoisers.save(model, jax.device_get(denoisers.init(model, jax.random.key(0))), tmp_path / "it.safetensors")
        with safe_open(tmp_path / "it.safetensors", "numpy") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        edit(tensors)
        save_file(tensors, tmp_path / "it.safetensors", metadata)
        return str(tmp_path / "it.safetensors")

    return make


@pytest.mark.slow
def test_the_first_block_of_the_denoiser_that_is_not_finite_is_named(tiny_config, edited, tmp_path):
    def overflow(tensors):
        for name, values in tensors.items():
            if "last_block" in name:
                values[...] = 1e38

    config = tiny_config(train__steps=4, train__log_every=1, train__max_nonfinite=1, train__init_from=edited(overflow))
    with pytest.raises(InputError, match=r"step 1 .*: the prediction of records .*, first after block 2 of 2"):
        train(build(config), tmp_path / "run")


def test_weights_that_are_not_finite_start_no_run(tiny_config, edited, tmp_path):
    def spoil(tensors):
        (name,) = [name for name in tensors if "head" in name and "out" in name and "bias" in name]
        tensors[name][0] = np.nan

    with pytest.raises(InputError, match="has infinite or undefined values in head/out/bias"):
        train(build(tiny_config(train__init_from=edited(spoil))), tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()


def test_the_first_leaf_that_is_not_finite_is_named():
    tree = {"a": np.ones(3), "b": {"c": np.array([1.0, np.inf]), "d": np.array([np.nan])}}
    nonfinite.check_finite({"average": tree["a"]})
    with pytest.raises(InputError, match="average b/c and 1 more has values that are not finite"):
        nonfinite.check_finite({"average": tree})


def test_a_network_that_overflows_in_an_update_is_not_saved(tiny_config, tmp_path, monkeypatch):
    def overflow(state, *_, **__):  # a learning rate that is too large does so
        params = jax.tree.map(lambda leaf: leaf * jnp.inf, state.params)
        return state.replace(step=state.step + 1, params=params), {"loss": jnp.float32(1)}

    monkeypatch.setattr(step_module, "train_step", overflow)
    config = tiny_config(train__steps=1)
    with pytest.raises(InputError, match="parameter .* has values that are not finite"):
        train(build(config), tmp_path)
    assert checkpoints.steps(tmp_path / "checkpoints") == []


def test_means_leave_out_steps_that_are_not_finite():
    buffer = MetricBuffer()
    for step, loss in enumerate((1.0, np.nan, 3.0, np.inf, 2.0, 4.0), 11):
        bad = 0.0 if np.isfinite(loss) else 1.0
        buffer.push(step, {"loss": jnp.float32(loss), "nonfinite": jnp.float32(bad)})
        if step == 14:
            buffer.take(14)
    ((first,), ()) = buffer.settle()
    buffer.take(16)
    ((second,), ()) = buffer.settle()
    assert (first.means["loss"], first.means["nonfinite"], first.nonfinite) == (2.0, 2.0, [12, 14])
    assert (second.means["loss"], second.nonfinite) == (3.0, [])


def test_a_step_that_is_not_finite_is_told_once_before_a_checkpoint_and_counts_in_its_row():
    buffer = MetricBuffer()
    told = []
    for step in range(1, 7):
        buffer.push(step, {"loss": jnp.float32(step), "nonfinite": jnp.float32(step in (2, 5))})
        if step == 3:
            told.append(buffer.settle()[1])
    buffer.take(6)
    ((row,), ()) = buffer.settle()
    assert told == [[2]] and row.nonfinite == [5] and row.means["nonfinite"] == 2 and row.means["loss"] == 3.5


def test_a_loss_far_above_the_running_median_is_marked():
    rows = []

    class Sink:
        def write(self, step, metrics):
            rows.append(metrics)

        def update(self, *_, **__):
            pass

    recorder = Recorder(Sink(), Sink(), 8, lambda step: 1e-3, past=[1.0, 1.2])
    for step, loss in enumerate((1.1, 2.9, 1.0), 1):
        recorder.push(step, {"loss": jnp.float32(loss)})
        recorder.interval(step)
        recorder.settle(step)
    assert ["loss_spike" in row for row in rows] == [False, True, False]
    assert rows[1]["loss_spike"] == pytest.approx(2.9 / 1.1)


def test_rows_of_a_batch_are_found_behind_its_parts():
    rows = nonfinite._rows_in_order(8, 2)
    assert rows.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_a_store_is_looked_through_before_the_first_step_and_not_again(tiny_config, tmp_path, monkeypatch):
    """Another store, or one of a run that an earlier version began, is."""
    experiment, looked = build(tiny_config()), []
    autoencoder = autoencoders.load(experiment.autoencoder.source)
    monkeypatch.setattr(run_data, "check_finite", lambda store, part: looked.append(part))

    def opened(**inputs):
        if inputs:
            write_config(experiment, tmp_path, inputs=Inputs(autoencoder="a", **inputs))
        return run_data.open_store(experiment, autoencoder, tmp_path), len(looked)

    store, times = opened()
    assert times == 1 and looked == [(0, 1)]
    assert opened(store=store.identity)[1] == 2
    assert opened(store=store.identity, finite=True)[1] == 2
    assert opened(store=store.identity._replace(records="other"), finite=True)[1] == 3


def test_a_store_with_a_record_that_is_not_finite_is_refused_and_leaves_no_folder(tiny_config, tmp_path, monkeypatch):
    original = stores_module.LatentStore.read

    def read(self, indices):
        size = self.manifest.record_bytes
        found = [bytearray(data) for data in original(self, indices)]
        for index, data in zip(indices, found, strict=True):
            data[size - 2 : size] = b"\x00\x7e" if index == 5 else data[size - 2 : size]  # NaN in half precision
        return [bytes(data) for data in found]

    monkeypatch.setattr(stores_module.LatentStore, "read", read)
    with pytest.raises(InputError, match="1 of 16 records have values that are not finite: .*record 5 in latents-"):
        train(build(tiny_config()), tmp_path / "run")
    assert not (tmp_path / "run").exists()
