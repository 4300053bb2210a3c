"""Runs: what they leave, resuming bit for bit, starting from another run, and what is refused."""

import collections
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.array import ArrayImpl

from lpl_jax import autoencoders
from lpl_jax.errors import InputError
from lpl_jax.experiment import TrainConfig, build
from lpl_jax.runs import checkpoints, open_run
from lpl_jax.runs import workdir as workdirs
from lpl_jax.training import data as run_data
from lpl_jax.training import initial, loop, train
from lpl_jax.training import step as step_module
from lpl_jax.training.logging import read_metrics
from lpl_jax.training.optimizer import make_optimizer

ROOT = Path(loop.__file__).parents[2]
pytestmark = pytest.mark.usefixtures("two_devices")


@pytest.fixture(scope="module")
def late_lpl(with_lpl):
    """Changes for a run of six steps, the last four of them with a perceptual loss whose weight is calibrated then."""
    return with_lpl | dict(lpl__taps=1, lpl__weight=None, loss__lpl_start=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_config, late_lpl, two_devices):
    """Six steps in one go: (workdir, result)."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, train(build(tiny_config(**late_lpl)), workdir)


def test_a_run_leaves_config_metrics_and_checkpoints(whole):
    workdir, result = whole
    assert (result.step, result.stopped) == (6, False)
    assert checkpoints.steps(workdir / "checkpoints") == [3, 6]
    assert workdirs.read_experiment(workdir).train.steps == 6
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert {"loss", "diffusion_loss", "learning_rate", "grad_norm"} <= set(line)
        assert ({"lpl", "lpl_share", "lpl/active_fraction"} <= set(line)) == (line["step"] > 2)
        assert line["loss"] >= line["diffusion_loss"] > 0
    assert list(workdir.glob("events.out.tfevents*"))


def test_steps_before_the_perceptual_loss_are_those_of_a_run_without_it(whole, tiny_config, tmp_path):
    workdir, _ = whole
    train(build(tiny_config(train__steps=2)), tmp_path)
    (plain,), before = read_metrics(tmp_path), read_metrics(workdir)[0]
    unknown = {"images_per_second": None}
    assert before | unknown == plain | unknown


@pytest.mark.parametrize("comparison", [False, True])
def test_no_weight_is_calibrated_on_a_network_that_is_not_trained(comparison, tiny_config, with_lpl, tmp_path):
    config = tiny_config() if comparison else tiny_config(**with_lpl | dict(lpl__weight=None))
    if comparison:
        config.comparison.kind, config.comparison.network = "latent_lpips", "x"
    name = "comparison" if comparison else "lpl"
    with pytest.raises(InputError, match=f"{name}.weight would be calibrated on a network that is not trained"):
        train(build(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weight_is_calibrated_to_the_share(whole):
    """Two batches of eight say what the share is about."""
    workdir, result = whole
    assert float(result.state.lpl_weight) > 0
    shares = [line["lpl_share"] for line in read_metrics(workdir) if line["step"] > 2]
    assert np.mean(shares) == pytest.approx(0.2, abs=0.1)


def test_a_run_whose_calibration_fails_leaves_no_folder(whole, tiny_config, with_lpl, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise InputError("no sample passed the gate")

    monkeypatch.setattr(loop, "term_weight", fails)
    config = tiny_config(train__init_from=str(whole[0]), **with_lpl | dict(lpl__weight=None))
    with pytest.raises(InputError, match="no sample"):
        train(build(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_averages_differ_from_the_parameters_and_each_other(whole):
    workdir, _ = whole
    run = open_run(workdir)
    params, default, slow = (run.params(weights=weights) for weights in ("params", None, "0.9"))
    assert run.experiment.ema.decays == (0.5, 0.9)
    kernels = [tree["head"]["out"]["kernel"] for tree in (params, default, slow)]
    assert len({float(np.abs(kernel).sum()) for kernel in kernels}) == 3
    with pytest.raises(InputError, match="0.999"):
        run.params(weights="0.999")


@pytest.mark.slow  # by default tests/training/test_determinism.py, without a term that begins in between
def test_a_stopped_run_resumes_bit_for_bit(whole, tmp_path, tiny_config, late_lpl, monkeypatch):
    """SIGTERM in the fourth step: the step is finished and saved, and the second call continues."""
    reference, result = whole
    experiment = build(tiny_config(**late_lpl))
    put, calls = loop.parallel.put_batch, []

    def interrupted(batch, mesh):
        calls.append(1)
        if len(calls) == 2 + 4:  # two are of the calibration
            os.kill(os.getpid(), signal.SIGTERM)
        return put(batch, mesh)

    monkeypatch.setattr(loop.parallel, "put_batch", interrupted)
    first = train(experiment, tmp_path / "run")
    assert (first.step, first.stopped) == (4, True)
    monkeypatch.undo()
    second = train(experiment, tmp_path / "run")
    assert (second.step, second.stopped) == (6, False)
    chex.assert_trees_all_equal(jax.device_get(second.state), jax.device_get(result.state))
    no_times = {"images_per_second": None}
    rows, expected = ([row | no_times for row in read_metrics(folder)] for folder in (tmp_path / "run", reference))
    assert rows == expected, "also the interval in which the signal came"
    # A run that is complete is left as it is.
    assert train(experiment, tmp_path / "run").step == 6


def started_from(experiment, workdir):
    mesh = loop.parallel.make_mesh(experiment.mesh)
    return initial.first_state(experiment, make_optimizer(experiment.optimizer)[0], mesh, workdir).params


def test_a_run_starts_from_the_step_that_is_named(whole, tmp_path, tiny_config):
    base, _ = whole
    for step, expected in ((3, 3), (None, 6)):
        config = tiny_config(train__init_from=str(base), train__init_step=step)
        chex.assert_trees_all_equal(started_from(build(config), tmp_path), open_run(base).params(
            step=expected, weights="params"))  # fmt: skip
    with pytest.raises(InputError, match="has no checkpoint of step 4; there are 3, 6"):
        started_from(build(tiny_config(train__init_from=str(base), train__init_step=4)), tmp_path)
    with pytest.raises(InputError, match=r"train.init_step=3 is not possible without train.init_from"):
        build(tiny_config(train__init_step=3))


def test_the_weight_of_another_run_is_taken(whole, tmp_path, tiny_config, with_lpl):
    """As it was calibrated there, by a run whose own calibration would give another."""
    base, result = whole
    changes = with_lpl | dict(lpl__weight=None, lpl__tau=0.5)
    experiment = build(tiny_config(**changes, train__weight_from=str(base)))
    objective = loop.make_objective(experiment, 1)
    nothing: dict = dict(state=None, frozen=None, stream=iter(()), experiment=experiment, mesh=None)
    assert initial.term_weight(objective, **nothing) == float(result.state.lpl_weight)
    initial.check_start(experiment)  # from scratch, as nothing is calibrated
    missing = build(tiny_config(**changes, train__weight_from=str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="nowhere: no run with a checkpoint is there; train it first"):
        train(missing, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"train.weight_from=x: lpl.weight=1.0 is given"):
        build(tiny_config(**with_lpl, train__weight_from="x"))
    with pytest.raises(InputError, match=r"train.weight_from=x: there is no LPL"):
        build(tiny_config(train__weight_from="x"))


def test_checkpoints_that_a_run_keeps():
    def kept(**fields):
        return TrainConfig(**fields).kept_steps()

    assert kept(steps=10, checkpoint_every=3, keep=1) == [10]
    assert kept(steps=10, checkpoint_every=3, keep=2, keep_every=6) == [6, 9, 10]
    assert kept(steps=12, checkpoint_every=3, keep=1, keep_every=4) == [12]  # 4 and 8 are never saved


@pytest.mark.slow
def test_post_training_starts_from_the_parameters_at_another_resolution(whole, tmp_path, tiny_config):
    base, _ = whole
    config = tiny_config(64, train__steps=1, train__init_from=str(base), train__init_weights="0.9")
    config.optimizer.learning_rate = 1e-30  # the first step leaves the parameters where they started
    result = train(build(config), tmp_path / "post")
    expected = open_run(base).params(weights="0.9")
    chex.assert_trees_all_close(result.state.params, expected, rtol=1e-7, atol=1e-12)
    chex.assert_trees_all_equal(result.state.emas["0.9"], result.state.params)


def test_the_host_waits_for_no_step(tmp_path, tiny_config, monkeypatch):
    """Values are fetched every `log_every` steps only, and then those of an interval that ended as long ago.

    Counted where jax turns an array into a host value: `jax.transfer_guard` sees no transfers on a CPU.
    """
    fetched, step, original = collections.Counter(), [0], ArrayImpl._value
    put, blocked = loop.parallel.put_batch, []

    def counting_put(batch, mesh):
        step[0] += 1
        return put(batch, mesh)

    def counting_value(array):
        fetched[step[0]] += 1
        return original.fget(array)

    def small_step(state, batch, *_, **__):  # the loop is what is looked at
        return state.replace(step=state.step + 1), {"loss": jnp.mean(batch["mean"]), "lpl": jnp.max(batch["mean"])}

    monkeypatch.setattr(step_module, "train_step", small_step)
    monkeypatch.setattr(loop.parallel, "put_batch", counting_put)
    monkeypatch.setattr(ArrayImpl, "_value", property(counting_value))
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: blocked.append(step[0]) or tree)
    train(build(tiny_config(train__steps=13, train__log_every=4, train__checkpoint_every=100)), tmp_path)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [4, 8, 12, 13]
    # The two values of steps 1 to 4 and 5 to 8, and how many were not finite; no learning rate, which would have to
    # wait for its turn on the device.
    assert {at: count for at, count in fetched.items() if 1 < at < 13} == {8: 3, 12: 3}
    assert max(blocked) == 1


def test_the_start_is_reported_by_part(whole):
    workdir, _ = whole
    lines = [json.loads(text) for text in (workdir / "startup.jsonl").read_text().splitlines()]
    steps = ["compile", "first step", "other"]
    parts = [(0, ["autoencoder", "state", "store", *steps]), (2, ["calibration", *steps])]
    assert [(line["step"], list(line["seconds"])) for line in lines] == parts
    for line in lines:
        assert all(value >= 0 for value in line["seconds"].values()) and line["seconds"]["compile"] > 0


def test_a_run_made_with_another_machines_kernel_is_read_here(whole, tmp_path):
    workdir, _ = whole
    raw = json.loads((workdir / "config.json").read_text())
    raw["model"]["attention"] = "splash"
    del raw["checksum"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert workdirs.read_experiment(tmp_path) == workdirs.read_experiment(workdir)


def test_a_folder_holds_one_run(whole, tiny_config, late_lpl):
    workdir, _ = whole
    config = tiny_config(**late_lpl)
    config.seed, config.optimizer.b2 = 3, 0.99
    before = (workdir / "config.json").read_text()
    with pytest.raises(InputError, match="optimizer.b2: was 0.95, now 0.99; seed: was 0, now 3; give"):
        train(build(config), workdir)
    assert (workdir / "config.json").read_text() == before


def test_a_folder_is_used_by_one_process_at_a_time(tmp_path, tiny_config):
    import fcntl

    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="in use by another process"):
            train(build(tiny_config()), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_foreign_config_is_not_taken_for_a_run(tmp_path, tiny_config):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="is not the folder of a run"):
        train(build(tiny_config()), tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_another_autoencoder_is_refused_with_both_names(tmp_path, tiny_config, tiny_folder):
    other = autoencoders.load(tiny_folder)
    other.params["decoder"]["conv_out"]["bias"] += 1
    autoencoders.save(other, tmp_path / "other")
    with pytest.raises(InputError) as caught:
        train(build(tiny_config(autoencoder__source=str(tmp_path / "other"))), tmp_path / "run")
    assert str(tiny_folder) in str(caught.value) and str(tmp_path / "other") in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_store_of_another_resolution_is_refused(tmp_path, tiny_config, stores):
    config = tiny_config(32, data__store=str(stores[64]))
    with pytest.raises(InputError, match="holds 64 px images; resolution=32"):
        train(build(config), tmp_path / "run")


@pytest.mark.parametrize("classes", [1, 3])
def test_a_model_with_other_classes_than_the_store_is_refused(tmp_path, tiny_config, classes):
    message = f"model.num_classes={classes}, but .* has 2 classes .ant, bee.: give --config.model.num_classes=2"
    with pytest.raises(InputError, match=message):
        train(build(tiny_config(model__num_classes=classes)), tmp_path / "run")


def test_a_run_goes_on_with_its_own_classes(tmp_path, tiny_config):
    (tmp_path / "classes.json").write_text('["ant", "wasp"]')
    with pytest.raises(InputError, match="learns other classes .*: class 1 is wasp there and bee here"):
        train(build(tiny_config()), tmp_path)


def test_batches_must_divide_over_the_mesh(tmp_path, tiny_config):
    with pytest.raises(InputError, match="batch_size=7 is not divisible by the 2 parts"):
        train(build(tiny_config(train__batch_size=7)), tmp_path / "run")


def test_missing_run_to_start_from(tmp_path, tiny_config):
    with pytest.raises(InputError, match="train.init_from=.*nowhere: not the folder of a run"):
        train(build(tiny_config(train__init_from=str(tmp_path / "nowhere"))), tmp_path / "run")


def test_a_missing_store_is_made_from_the_source(tmp_path, tiny_config, image_folder):
    config = tiny_config(32)
    config.data.store, config.data.source = None, str(image_folder)
    experiment = dataclasses.replace(build(config), resolution=32)
    store = run_data.open_store(experiment, autoencoders.load(config.autoencoder.source), tmp_path)
    assert (len(store), store.path) == (16, tmp_path / "latents")


@pytest.mark.slow
def test_a_killed_process_resumes_bit_for_bit(tmp_path, tiny_config, late_lpl, whole):
    """SIGKILL at a random moment behind the first checkpoint."""
    _, result = whole
    config = tiny_config(**late_lpl)
    overrides = [
        f"--config.{section}.{field}={value}"
        for section, fields in config.to_dict().items()
        if isinstance(fields, dict)
        for field, value in fields.items()
        if value is not None and section in ("data", "autoencoder", "model", "optimizer", "ema", "train", "loss", "lpl")
    ]
    command = [sys.executable, "train.py", "--config=configs/base.py", f"--workdir={tmp_path / 'run'}"]
    command += ["--config.resolution=32", *overrides]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"  # the last of a flag counts
    environment = os.environ | {"XLA_FLAGS": flags}
    running = subprocess.Popen(command, cwd=ROOT, env=environment)
    while not checkpoints.steps(tmp_path / "run/checkpoints"):
        assert running.poll() is None
        time.sleep(0.05)
    running.kill()
    running.wait()
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == 0
    params = open_run(tmp_path / "run").params(weights="params")
    chex.assert_trees_all_equal(params, jax.device_get(result.state.params))


@pytest.mark.slow
@pytest.mark.shared
def test_the_readme_command_on_real_imagenet_photographs(shared, tmp_path, capfd):
    """`lpl train --config imagenet:256,lpl ...` at a size for this machine."""
    from lpl_jax.tools import train as program

    status = program.main(
        [
            "--config=configs/imagenet.py:256,lpl,tiny",
            f"--workdir={tmp_path / 'run'}",
            f"--config.data.source={shared / 'data/imagenet1k-sample/train'}",
            "--config.data.limit=8",
            "--config.autoencoder.source=bundled",
            "--config.train.batch_size=8",
            "--config.train.steps=2",
            "--config.lpl.weight=1",  # given: a calibration would compile the loss once more
            "--config.loss.lpl_start=1",
        ]
    )
    assert status == 0
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["step"] == 2
    assert all(np.isfinite(value) for line in lines for value in line.values())
