import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lpl_jax
from lpl_jax.errors import InputError
from lpl_jax.experiment import OptimizerConfig
from lpl_jax.parallel import MeshConfig, make_mesh, param_sharding, put_batch
from lpl_jax.runs import checkpoint_files, checkpoints
from lpl_jax.runs.checkpoints import (
    Checkpointer,
    latest_step,
    load_params,
    read_metadata,
    restore,
    steps,
)
from lpl_jax.stopping import StopSignal
from lpl_jax.training.optimizer import make_optimizer
from lpl_jax.training.state import abstract_state, apply_gradients, create_state

DECAYS = (0.9, 0.9999)
OPTIMIZER, _ = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=2))


def init_params(key, width=256):
    return {"head": {"kernel": 0.1 * jax.random.normal(key, (width, width)), "bias": jnp.zeros(width)}}


def new_state(mesh, seed=0):
    return create_state(init_params, OPTIMIZER, DECAYS, mesh, jax.random.key(seed), lpl_weight=2.5)


def target(mesh, init=init_params, decays=DECAYS):
    return abstract_state(init, OPTIMIZER, decays, mesh, jax.random.key(0))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=4))


@pytest.fixture(scope="module")
def step(mesh):
    def one(state, batch):
        def loss(params):
            return jnp.mean((batch["x"] @ params["head"]["kernel"] + params["head"]["bias"] - batch["y"]) ** 2)

        return apply_gradients(state, jax.grad(loss)(state.params), OPTIMIZER)[0]

    jitted = jax.jit(one, donate_argnums=0, out_shardings=param_sharding(target(mesh), mesh))

    def advance(state, to):
        """Train up to step `to`. The batch is a function of the step."""
        for n in range(int(state.step), to):
            x = np.random.default_rng(n).normal(size=(2, 8, 256)).astype("f4")
            state = jitted(state, put_batch({"x": x[0], "y": x[1]}, mesh))
        return state

    return advance


@pytest.fixture(scope="module")
def saved(mesh, step, tmp_path_factory):
    """A folder with checkpoints of steps 2 and 3, and the states as they were."""
    folder, states = tmp_path_factory.mktemp("saved"), {}
    with Checkpointer(folder, metadata={"config": {"seed": 7}}) as checkpointer:
        state = new_state(mesh)
        for n in (2, 3):
            state = step(state, n)
            checkpointer.save(state)
            states[n] = jax.device_get(state)
    return folder, states


def assert_equal(a, b):
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    chex.assert_trees_all_equal(a, b)


def test_resumed_run_equals_one_that_was_not_stopped(mesh, step, tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        state = step(new_state(mesh), 3)
        checkpointer.save(state)
        state = step(state, 6)  # donates what is being written
    with Checkpointer(tmp_path, start_step=latest_step(tmp_path)) as checkpointer:
        resumed = restore(tmp_path, target(mesh))
        assert int(resumed.step) == 3
        assert not checkpointer.save(resumed)  # it is there already
        resumed = step(resumed, 6)
        assert checkpointer.save(resumed)
    assert_equal(resumed, state)
    assert steps(tmp_path) == [3, 6]
    assert_equal(restore(tmp_path, target(mesh)), state)


def test_what_is_saved_is_the_state_at_the_time(mesh, step, saved):
    """The host copy is taken before `save` returns: steps that overwrite the buffers meanwhile do not show."""
    folder, states = saved
    for n in (2, 3):
        assert_equal(restore(folder, target(mesh), n), states[n])
    assert_equal(step(restore(folder, target(mesh), 2), 3), states[3])


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (1, 4, 2)])
def test_restore_onto_another_mesh(sizes, saved):
    folder, states = saved
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    state = restore(folder, target(mesh), 3)
    assert_equal(state, states[3])
    kernel = state.opt_state[1].mu["head"]["kernel"]
    assert kernel.sharding.mesh.shape == mesh.shape
    assert kernel.addressable_shards[0].data.size == kernel.size // sizes[1]


def test_old_checkpoints_are_removed_but_for_some(mesh, tmp_path):
    state = new_state(mesh)
    with Checkpointer(tmp_path, keep=2, keep_every=4) as checkpointer:
        for n in range(1, 8):
            checkpointer.save(state.replace(step=jnp.int32(n)))
        checkpointer.wait()
        assert steps(tmp_path) == [4, 6, 7]
        assert latest_step(tmp_path) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "6", "7"]


def test_metadata(saved):
    assert read_metadata(saved[0]) == {"config": {"seed": 7}, "lpl_jax_version": lpl_jax.__version__, "step": 3}
    assert read_metadata(saved[0], 2)["step"] == 2


def test_checkpoints_of_another_run_are_not_written_over(saved):
    folder, _ = saved
    with pytest.raises(InputError, match="holds checkpoints of steps 2, 3, which a new run would overwrite"):
        Checkpointer(folder)
    with pytest.raises(InputError, match="holds checkpoints of steps 3, which a run that resumes from step 2 would"):
        Checkpointer(folder, start_step=2)
    with pytest.raises(InputError, match="keep is 0"):
        Checkpointer(folder, start_step=3, keep=0)


def test_parameters_alone(mesh, saved, monkeypatch):
    folder, states = saved
    read, targets = checkpoints._read, []
    monkeypatch.setattr(checkpoints, "_read", lambda path, tree: targets.append(tree) or read(path, tree))
    assert_equal(load_params(folder), states[3].params)
    assert_equal(load_params(folder, "0.9", step=2), states[2].emas["0.9"])
    assert not np.array_equal(states[2].emas["0.9"]["head"]["kernel"], states[2].emas["0.9999"]["head"]["kernel"])
    assert [len(jax.tree.leaves(tree)) for tree in targets] == [2, 2]  # a kernel and a bias, nothing else


def test_parameters_into_shardings_start_another_run(mesh, saved):
    folder, states = saved
    params = load_params(folder, "0.9999", target=target(mesh).params)
    assert params["head"]["kernel"].addressable_shards[0].data.size == 256 * 256 // 4
    state = create_state(lambda params: params, OPTIMIZER, (0.5,), mesh, params)
    assert_equal(state.params, states[3].emas["0.9999"])
    assert int(state.step) == 0


def test_what_is_not_there_is_named_with_what_is(mesh, saved, tmp_path):
    folder, _ = saved
    with pytest.raises(InputError, match="no average of the parameters named 0.5; it has 0.9, 0.9999"):
        load_params(folder, "0.5")
    with pytest.raises(InputError, match="no average of the parameters named 0.99; it has 0.9, 0.9999"):
        restore(folder, target(mesh, decays=(0.9, 0.99)))
    with pytest.raises(InputError, match=f"no checkpoint of step 5 in {folder}; there are 2, 3"):
        restore(folder, target(mesh), 5)
    with pytest.raises(InputError, match=f"no checkpoint in {tmp_path}$"):
        load_params(tmp_path)
    with pytest.raises(InputError, match=f"no checkpoint in {tmp_path}/none, which does not exist"):
        read_metadata(tmp_path / "none")
    assert steps(tmp_path / "none") == [] and latest_step(tmp_path) is None


def test_all_arrays_that_do_not_fit_are_named_with_both_shapes(mesh, saved):
    def other(key):
        return {"head": init_params(key, 128)["head"], "extra": {"bias": jnp.zeros(3)}}

    with pytest.raises(InputError) as error:
        load_params(saved[0], target=target(mesh, other).params)
    message = str(error.value)
    assert "head/kernel is (256, 256) float32 in the checkpoint and (128, 128) float32 here" in message
    assert "head/bias is (256,) float32 in the checkpoint and (128,) float32 here" in message
    assert "extra/bias is missing in the checkpoint and (3,) float32 here" in message
    with pytest.raises(InputError, match=r"opt_state/1/mu/head/kernel is \(256, 256\)"):
        restore(saved[0], target(mesh, other))
    with pytest.raises(InputError, match=r"emas/0.9999/head/bias is \(256,\) float32 in .* and not known here"):
        restore(saved[0], target(mesh, decays=(0.9,)))


def _truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _empty(file):
    file.write_bytes(b"")


def _swap(file):
    """For the file in its place in the checkpoint before, which is as valid, and may have a file more or less."""
    folder = next(each for each in file.parents if each.name == "3")
    alike = sorted(each for each in folder.rglob("*") if each.is_file())
    others = sorted(each for each in (folder.parent / "2").rglob("*") if each.is_file())
    file.write_bytes(others[min(alike.index(file), len(others) - 1)].read_bytes())


def _as_another_list(file):
    file.write_bytes(b"{}\n" if file.suffix == ".json" else b'{"step": 3}')


SELDOM = [pytest.param(damage, marks=pytest.mark.slow) for damage in (_empty, _as_another_list)]


@pytest.mark.parametrize("damage", [_flip_a_bit, _truncate, Path.unlink, _swap, *SELDOM])
def test_damage_to_any_file_of_a_checkpoint_is_noticed(damage, mesh, tmp_path, saved, capfd):
    """By whoever goes on with the run, and by who reads the part that the file is of."""
    folder = copy_of(saved, tmp_path)
    reads = {
        "params": lambda: load_params(folder),
        "ema_0.9": lambda: load_params(folder, "0.9"),
        "training": lambda: checkpoints.load_weight(folder),
        "metadata": lambda: read_metadata(folder),
    }
    files = sorted(path for path in (folder / "3").rglob("*") if path.is_file())
    assert {"files.json", "_CHECKPOINT_METADATA", "commit_success.txt", "metadata"} < {path.name for path in files}
    noticed = set()
    for file in files:
        content = file.read_bytes()
        damage(file)
        if not file.exists() or file.read_bytes() != content:
            noticed.add(file)
            with pytest.raises(InputError, match="3 is damaged: .*on-damage=previous") as error:
                restore(folder, target(mesh))
            assert "\n" not in str(error.value)
            item = file.relative_to(folder / "3").parts[0]
            for read in [reads[item]] if item in reads else reads.values() if file.parent.name == "3" else []:
                with pytest.raises(InputError, match="3 is damaged: .*; step 2 is good: --checkpoint 2 takes it"):
                    read()
        file.write_bytes(content)
    assert len(noticed) >= (len(files) - 20 if damage is _swap else len(files) - 1)
    assert "Traceback" not in capfd.readouterr().err
    assert_equal(restore(folder, target(mesh)), saved[1][3])


def test_the_time_of_a_checkpoint_is_all_that_may_change(tmp_path, saved):
    folder = copy_of(saved, tmp_path) / "3"
    about = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
    assert checkpoint_files.faults(folder) == []
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(about | {"commit_timestamp_nsecs": 10**18}))
    assert checkpoint_files.faults(folder) == []
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(about | {"init_timestamp_nsecs": 10**18}))
    assert checkpoint_files.faults(folder) == ["_CHECKPOINT_METADATA is not what was written"]


def test_a_file_too_many_is_noticed_but_for_hidden_ones(tmp_path, saved):
    folder = copy_of(saved, tmp_path) / "3"
    (folder / "params/d/.nfs0001").write_text("")
    assert checkpoint_files.faults(folder) == []
    (folder / "params/d/more").write_text("")
    assert checkpoint_files.faults(folder) == ["params/d/more is none of its files"]


@pytest.mark.parametrize("text", ['{"../2/params/_METADATA": [1, 2]}', '{"/etc/passwd": [1, 2]}', '{"params/x": [1]}',
                                  '{"params/x": [true, 1]}', "[]", "3", "[" * 100_000, "\xff"])  # fmt: skip
def test_a_list_of_files_of_another_form_is_none(text, tmp_path, saved):
    folder = copy_of(saved, tmp_path) / "3"
    (folder / "files.json").write_bytes(text.encode("latin-1"))
    assert checkpoint_files.faults(folder) == ["files.json is not what was written"]


def as_before(folder):
    """The list of files as earlier versions wrote it: without itself and what Orbax adds."""
    listed = json.loads((folder / "files.json").read_text())
    kept = {name: entry for name, entry in listed.items() if "/" in name and not name.endswith("/commit_success.txt")}
    (folder / "files.json").write_text(json.dumps(kept) + "\n")


def test_checkpoints_of_earlier_versions_are_read(mesh, tmp_path, saved):
    folder = copy_of(saved, tmp_path)
    as_before(folder / "3")
    assert_equal(restore(folder, target(mesh)), saved[1][3])
    _flip_a_bit(largest(folder / "3/params"))
    with pytest.raises(InputError, match="is not what was written"):
        restore(folder, target(mesh))


def test_the_last_good_checkpoint_is_gone_on_from_when_that_is_asked_for(mesh, step, tmp_path, saved):
    folder, said = copy_of(saved, tmp_path), []
    _truncate(folder / "3/params/_METADATA")
    checkpoints.set_damaged_aside(folder, said.append)
    assert [text.partition(" is damaged")[0] for text in said] == [f"checkpoint {folder}/3"]
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3.damaged"] and steps(folder) == [2]
    with Checkpointer(folder, start_step=2) as checkpointer:  # it comes by this step again
        checkpointer.save(step(restore(folder, target(mesh)), 3))
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3", "3.damaged"]
    assert_equal(restore(folder, target(mesh)), saved[1][3])
    checkpoints.set_damaged_aside(folder, said.append)
    assert len(said) == 1, "a good one stays"
    for n in (2, 3):
        _empty(folder / f"{n}/params/_METADATA")
    with pytest.raises(InputError, match="3 is damaged: .*; other steps in its folder: 2; none of them is good"):
        checkpoints.set_damaged_aside(folder, said.append)
    assert steps(folder) == [2, 3]


def test_what_is_not_on_disk_as_it_was_in_memory_never_gets_its_name(mesh, tmp_path, monkeypatch):
    """As if the disk had lost a bit: it is said in one line, what was written before is kept, and saving goes on."""
    state = new_state(mesh)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(state.replace(step=jnp.int32(1)))
        checkpointer.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "_sum_of_bits", lambda array, real=checkpoints._sum_of_bits: (
                real(array) ^ int(threading.current_thread() is not threading.main_thread())
            ))  # fmt: skip
            checkpointer.save(state.replace(step=jnp.int32(2)))
            with pytest.raises(InputError, match=r"2 was not written as it was in memory .*those before it are: 1$"):
                checkpointer.wait()
    assert steps(tmp_path) == [1]
    with Checkpointer(tmp_path, start_step=1, keep=1) as checkpointer:
        checkpointer.save(state.replace(step=jnp.int32(2)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2"]


def test_the_sum_of_bits_sees_every_bit(mesh):
    rng = np.random.default_rng(0)
    for dtype in ("float32", "float16", "int8", "bool", "float64", jnp.bfloat16):
        array = rng.integers(0, 2, (3, 5)).astype(dtype)
        changed = array.copy()
        changed.view("u1")[1, -1] ^= 1
        assert checkpoints._sum_of_bits(array) != checkpoints._sum_of_bits(changed)
    sharded = put_batch({"x": rng.normal(size=(8, 4)).astype("f4")}, mesh)
    assert checkpoints._sums(sharded) == {"x": checkpoints._sum_of_bits(np.asarray(sharded["x"]))}


@pytest.mark.parametrize("change", ["removed", "renamed"])
def test_a_folder_that_is_gone_is_not_made_anew(change, mesh, tmp_path):
    folder, state = tmp_path / "run/checkpoints", new_state(mesh)
    with pytest.raises(InputError, match=f"{folder} was {change}"), Checkpointer(folder) as checkpointer:
        checkpointer.save(state.replace(step=jnp.int32(1)))
        checkpointer.wait()
        shutil.rmtree(tmp_path / "run") if change == "removed" else (tmp_path / "run").rename(tmp_path / "other")
        checkpointer.save(state.replace(step=jnp.int32(2)))
    assert not (tmp_path / "run").exists()
    assert change == "removed" or steps(tmp_path / "other/checkpoints") == [1]


def copy_of(saved, tmp_path):
    subprocess.run(["cp", "-r", saved[0], tmp_path / "copy"], check=True)
    return tmp_path / "copy"


def largest(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "commit_success.txt"]
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("item", ["params", "ema_0.9999", "training", "metadata"])
def test_what_is_not_read_is_not_checked(item, mesh, tmp_path, saved, monkeypatch):
    """Damage elsewhere is no matter to who reads one average; to who goes on with the run it is."""
    folder, checked, measure = copy_of(saved, tmp_path), [], checkpoint_files.size_and_checksum
    _flip_a_bit(largest(folder / "3" / item))
    monkeypatch.setattr(checkpoint_files, "size_and_checksum", lambda file: checked.append(file) or measure(file))
    assert_equal(load_params(folder, "0.9"), saved[1][3].emas["0.9"])
    assert checked and {file.relative_to(folder).parts[:2] for file in checked} == {("3", "ema_0.9")}
    with pytest.raises(InputError, match=f"damaged: {item}/.* is not what was written"):
        restore(folder, target(mesh))


def test_processes_share_the_checking(tmp_path, saved, monkeypatch):
    """As process I of 3, without the others: each sees its third of the files, and together they see all."""
    folder, shares, measure = saved[0], [], checkpoint_files.size_and_checksum
    everything = [name for name in json.loads((folder / "3/files.json").read_text()) if name.startswith("params/")]
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(checkpoints.distributed, "on_all", lambda check: check())
    monkeypatch.setattr(checkpoint_files, "size_and_checksum", lambda file: shares[-1].append(file) or measure(file))
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        shares.append([])
        checkpoints._verify(checkpoints._absolute(folder) / "3", "params")
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    seen = [file.relative_to(folder / "3").as_posix() for share in shares for file in share]
    assert sorted(seen) == sorted(everything)


def test_the_layout_of_an_earlier_version_is_refused(mesh, tmp_path, saved):
    folder = copy_of(saved, tmp_path)
    (folder / "3/params").rename(folder / "3/state")
    for read in (lambda: restore(folder, target(mesh)), lambda: load_params(folder)):
        with pytest.raises(InputError, match="copy/3 is of an earlier version, whose layout this one does not read"):
            read()


KILLED = """
import sys, jax, jax.numpy as jnp, optax
from lpl_jax.parallel import MeshConfig, make_mesh
from lpl_jax.runs.checkpoints import Checkpointer
from lpl_jax.training.state import create_state
mesh = make_mesh(MeshConfig(), jax.devices()[:1])
init = lambda key: {"kernel": jax.random.normal(key, (2048, 2048))}
state = create_state(init, optax.sgd(1.0), (), mesh, jax.random.key(0))
with Checkpointer(sys.argv[1], keep=2) as checkpointer:
    for n in range(1, 10**6):
        checkpointer.save(state.replace(step=jnp.int32(n), params={"kernel": state.params["kernel"] + n}))
"""


def test_killed_while_saving(tmp_path):
    """SIGKILL at any time leaves complete checkpoints and what a later run clears away."""
    root = Path(lpl_jax.__file__).parents[1]
    env = os.environ | {"PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=env, cwd=root)
    deadline = time.monotonic() + 120
    # Until it is in the middle of the second one.
    while latest_step(tmp_path) is None or not list(tmp_path.glob("*tmp*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    step = latest_step(tmp_path)
    kernel = jax.random.normal(jax.random.key(0), (2048, 2048)) + step
    np.testing.assert_array_equal(load_params(tmp_path)["kernel"], kernel)
    with Checkpointer(tmp_path, start_step=step) as checkpointer:
        checkpointer.save(new_state(make_mesh(MeshConfig())).replace(step=jnp.int32(step + 1)))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([str(step), str(step + 1)])


def test_a_run_stopped_by_a_signal_goes_on_where_it_was(mesh, step, tmp_path, saved):
    def run(start):
        state = new_state(mesh) if start is None else restore(tmp_path, target(mesh))
        with Checkpointer(tmp_path, start_step=start) as checkpointer, StopSignal() as stop:
            for n in range(int(state.step) + 1, 4):
                state = step(state, n)
                if n == 2 and start is None:
                    os.kill(os.getpid(), signal.SIGTERM)
                if stop.requested:
                    break
            checkpointer.save(state)

    run(None)
    assert steps(tmp_path) == [2]
    run(2)
    assert_equal(restore(tmp_path, target(mesh)), saved[1][3])
