"""Weights out of runs and into runs: exact in every form, all or nothing, and one line for what cannot be."""

import json
import logging
import pickle
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from diffusers import SD3Transformer2DModel
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lpl_jax
from lpl_jax import denoisers
from lpl_jax.denoisers import weights as weight_files
from lpl_jax.errors import InputError
from lpl_jax.experiment import build
from lpl_jax.io import tensors
from lpl_jax.runs import Run, checkpoints, open_run
from lpl_jax.tools import cli, config_file, import_run, verbs

CONFIG = """
from lpl_jax.configs import base

def get_config(kind=""):
    c = base.get_config()
    c.resolution = 32
    c.model.preset, c.model.latent_channels = "fields", 4
    c.model.hidden, c.model.depth, c.model.heads, c.model.base_grid = 16, 2, 2, 2
    if kind == "text":
        c.text.source, c.model.context_dim, c.model.pooled_dim = "bundled", 128, 128
    else:
        c.model.num_classes = 3
    c.ema.decays = (0.5, 0.9)
    return c
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory, write_run):
    """A config file, and a run of each kind with checkpoints of steps 3 and 6."""
    root = tmp_path_factory.mktemp("export")
    (root / "config.py").write_text(CONFIG)
    for kind in ("labels", "text"):
        write_run(root / kind, build(config_file.load(f"{root / 'config.py'}:{kind}")), (3, 6))
    return root


@pytest.fixture
def here(root, tmp_path, monkeypatch):
    """An empty folder to work in, with the config and a run of each kind to read or to break."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    return tmp_path


def call(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run_main(verbs.main, argv.split())
    return caught.value.code, *capsys.readouterr()


def refused(argv, capsys):
    """The one line that a mistake ends with. Nothing is left beside what was there."""
    before = sorted(Path.cwd().iterdir())
    status, out, err = call(argv, capsys)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert sorted(Path.cwd().iterdir()) == before
    return err


def lacks(text, *words):
    return [word for word in words if word not in text]


def read_about(place):
    if place.is_dir():
        return json.loads((place / "config.json").read_text())["_lpl_jax"]
    with safe_open(place, "np") as file:
        return json.loads(file.metadata()["lpl_jax.MMDiT"])["_lpl_jax"]


@pytest.mark.parametrize(
    ("run", "place", "flags", "layout"),
    [
        ("labels", "new/one.safetensors", "", "lpl_jax"),
        ("labels", "new/folder", "--layout lpl_jax --weights params --checkpoint 3", "lpl_jax"),
        ("text", "new/folder", "--weights 0.9", "diffusers"),
        ("text", "one.safetensors", "--layout lpl_jax --checkpoint 3", "lpl_jax"),
    ],
)
def test_what_comes_out_is_what_the_checkpoint_holds(run, place, flags, layout, here, capsys):
    status, out, err = call(f"export --workdir {run} --out {place} {flags}", capsys)
    step = 3 if "--checkpoint" in flags else 6
    name = next((name for name in ("params", "0.9") if name in flags), "0.5")
    assert (status, err) == (0, "")
    opened = open_run(here / run)
    want = opened.params(weights=name, step=step)
    number = sum(leaf.size for leaf in jax.tree.leaves(want))
    assert out == f"{place}: {layout} layout, {number:,} parameters, step {step}, weights {name}\n"
    model, params = denoisers.load(place)
    chex.assert_trees_all_equal(params, want)
    assert model.config == opened.experiment.model
    assert read_about(here / place) == {"version": lpl_jax.__version__, "step": step, "weights": name}
    # Others may read it as they may read any new file, and no trace of the writing is left.
    weights = here / place if place.endswith(".safetensors") else here / place / weight_files.WEIGHTS[layout]
    assert weights.stat().st_mode == (here / "config.py").stat().st_mode
    assert not list(here.rglob("*.partial"))


def test_diffusers_folders_go_through_a_run_and_come_back(here, capsys, caplog):
    theirs = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=128,
        caption_projection_dim=16,
        pooled_projection_dim=128,
        pos_embed_max_size=None,
        qk_norm="rms_norm",
    )
    theirs.save_pretrained("theirs")
    status, out, _ = call("import theirs --config config.py:text --workdir imported", capsys)
    assert status == 0 and out.startswith("imported: a run at step 0, ") and out.endswith(" parameters from theirs\n")
    assert call("export --workdir imported --out back", capsys)[0] == 0
    logging.getLogger("diffusers").addHandler(caplog.handler)
    again = SD3Transformer2DModel.from_pretrained("back")
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    # accelerate only makes loading faster; it says so for every folder.
    assert [record.message for record in caplog.records if "accelerate" not in record.message] == []
    want, got = theirs.state_dict(), again.state_dict()
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in theirs.config.items() if k[0] != "_"
    }


def test_an_imported_run_has_the_weights_everywhere(here, target_of, capsys):
    assert call("export --workdir labels --out one.safetensors --checkpoint 3", capsys)[0] == 0
    overrides = "--config.train.steps=7 --config.model.dtype=bfloat16"
    assert call(f"import one.safetensors --config config.py {overrides} --workdir new/run", capsys)[0] == 0
    want = open_run("labels").params(weights="0.5", step=3)
    for weights in ("params", "0.5", "0.9"):
        run = open_run("new/run")
        chex.assert_trees_all_equal(run.params(weights=weights), want)
    assert (run.experiment.train.steps, run.experiment.model.dtype) == (7, "bfloat16")
    metadata = checkpoints.read_metadata("new/run/checkpoints")
    assert (metadata["step"], metadata["imported_from"]) == (0, "one.safetensors")
    assert sorted(path.name for path in Path("new/run").iterdir()) == ["checkpoints", "config.json"]
    # The state is that of a run which begins: no moments of an optimizer, no weight of the perceptual loss.
    state = checkpoints.restore("new/run/checkpoints", target_of(run.experiment))
    assert not state.is_calibrated and not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


def test_a_model_without_a_class_in_diffusers_says_why_and_what_takes_it(here, capsys):
    err = refused("export --workdir labels --out folder", capsys)
    assert not lacks(err, "num_classes = 3", "pooled_dim = 0", "--layout lpl_jax", ".safetensors")
    err = refused("export --workdir text --out one.safetensors --layout diffusers", capsys)
    assert not lacks(err, "one.safetensors", "'diffusers'", "give a folder")


def test_nothing_is_written_over(here, capsys):
    for place in ("config.py", "text", "one.safetensors"):
        Path("one.safetensors").write_text("mine")
        assert f"{place} exists" in refused(f"export --workdir labels --out {place} --layout lpl_jax", capsys)
    assert Path("one.safetensors").read_text() == "mine"
    assert "text exists" in refused("import labels --config config.py --workdir text", capsys)


def edit_config(**fields):
    def edit(run):
        config = json.loads((run / "config.json").read_text())
        config["model"] |= fields
        (run / "config.json").write_text(json.dumps(config))

    return edit


def write_config(text):
    return lambda run: (run / "config.json").write_text(text)


def damage(run):
    file = max((run / "checkpoints/6/ema_0.5").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        (lambda run: None, "--checkpoint 5", ["no checkpoint of step 5", "3, 6"]),
        (lambda run: None, "--weights 0.999", ["weights '0.999' are not in run", "params, 0.5, 0.9"]),
        (damage, "", ["checkpoints/6 is damaged", "other steps in its folder: 3"]),
        (lambda run: shutil.rmtree(run / "checkpoints"), "", ["run has no checkpoint yet"]),
        (lambda run: (run / "config.json").unlink(), "", ["run/config.json", "no such file"]),
        (write_config("{"), "", ["run/config.json cannot be read as JSON"]),
        (write_config("[3]"), "", ["run/config.json holds a JSON list"]),
        (write_config('{"resolution": 32, "model": 3}'), "", ["run/config.json is not the config of a run"]),
        (edit_config(hidden="16"), "", ["model.hidden='16'"]),
        (edit_config(width=16), "", ["model.width is not known"]),
        (edit_config(context_attn="shared", num_classes=4), "", ["surplus blocks/context_attn/k/bias", "label_embed"]),
        (edit_config(hidden=2**16, heads=1), "", ["hidden = 65536", "out of all proportion"]),
    ],
)
def test_runs_that_cannot_be_exported(change, flags, words, here, capsys, monkeypatch):
    Path("labels").rename("run")
    change(here / "run")
    err = refused(f"export --workdir run --out new.safetensors {flags}", capsys)
    assert not lacks(err, *words)


def test_a_model_that_diverged_is_not_exported(here, capsys, monkeypatch):
    params = open_run("labels").params()
    params["head"]["out"]["bias"] = params["head"]["out"]["bias"] * np.float32("nan")
    monkeypatch.setattr(Run, "params", lambda *_, **__: params)
    assert "undefined values in head/out/bias" in refused("export --workdir labels --out new.safetensors", capsys)


def test_weights_of_another_model_are_listed_field_by_field_and_parameter_by_parameter(here, capsys):
    call("export --workdir labels --out one.safetensors", capsys)
    changes = "--config.model.num_classes=4 --config.model.context_attn=shared --config.model.base_grid=4"
    err = refused(f"import one.safetensors --config config.py {changes} --workdir new", capsys)
    assert not lacks(
        err,
        "num_classes = 3 there, 4 in the config",
        "context_attn = 'own' there, 'shared' in the config",
        "base_grid = 2 there, 4 in the config",
        "label_embed/embedding has shape (4, 16), the config needs (5, 16)",
        "surplus blocks/context_attn/k/kernel",
        "; and 13 more; ",
    )
    err = refused("import one.safetensors --config config.py:text --workdir new", capsys)
    assert not lacks(
        err, "missing context_embed/kernel", "surplus label_embed/embedding", "missing pooled_mlp/fc1/bias"
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("import labels --workdir new", ["missing --config"]),
        ("import labels --config config.py", ["missing --workdir"]),
        ("import --config config.py --workdir new", ["missing SOURCE"]),
        ("import labels --config config.py --workdir new --out x", ["unknown flag --out; possible: ", "--workdir"]),
        ("import ./nowhere --config config.py --workdir new", ["nowhere/config.json does not exist"]),
        ("import nowhere.safetensors --config config.py --workdir new", ["nowhere.safetensors", "no such file"]),
        ("import labels --config config.py --workdir new", ["labels/config.json: class None"]),
        ("import labels --config config.py --config.resolution=31 --workdir new", ["not divisible by 8"]),
        (
            "import labels --config config.py --config.train.init_from=text --workdir new",
            ["train.init_from=text", "starts from by itself"],
        ),
        ("import config.py --config config.py --workdir new", ["config.py", "not a file of weights"]),
    ],
)
def test_mistakes_of_an_import(argv, words, here, capsys):
    assert not lacks(refused(argv, capsys), *words)


def test_a_network_of_absurd_size_is_not_worked_out(here, capsys, monkeypatch):
    call("export --workdir labels --out one.safetensors", capsys)
    made, init = [], weight_files.init
    monkeypatch.setattr(weight_files, "init", lambda config, key: made.append(config.hidden) or init(config, key))
    argv = "import one.safetensors --config config.py --config.model.hidden=65536 --workdir new"
    assert not lacks(refused(argv, capsys), "hidden = 16 there, 65536 in the config", "out of all proportion")
    assert made == [16], "the shapes of the file's network alone"


class Hostile:
    """Makes the file `marker` when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("marker"),)


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w.pth", "w/diffusion_pytorch_model.bin"])
def test_pickles_are_never_executed(name, here, capsys):
    (here / "w").mkdir()
    (here / "w/config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel"}))
    (here / name).write_bytes(pickle.dumps({"proj_out.bias": Hostile()}))
    place = "w" if "/" in name else name
    assert "safetensors" in refused(f"import {place} --config config.py --workdir new", capsys)
    assert not Path("marker").exists()
    pickle.loads((here / name).read_bytes())
    assert Path("marker").exists(), "the pickle would have done it"


def test_a_tampered_file_is_refused_by_the_import(here, capsys):
    call("export --workdir labels --out one.safetensors", capsys)
    content = Path("one.safetensors").read_bytes()
    Path("one.safetensors").write_bytes(content[:-4])
    assert "one.safetensors is damaged" in refused("import one.safetensors --config config.py --workdir new", capsys)


def test_nothing_has_its_name_before_it_is_whole(here, monkeypatch):
    """A write that stops half-way: no place has appeared, and the next attempt goes through."""
    run = open_run("labels")
    experiment, params = run.experiment, run.params()

    def half(given, path, metadata):
        save_file(dict(list(given.items())[:3]), path, metadata)
        assert not Path("place").exists() and not Path("place.safetensors").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "save_file", half)
    for place in ("place", "place.safetensors"):
        with pytest.raises(OSError, match="No space"):
            denoisers.save(experiment.model, params, place, layout="lpl_jax")
        assert not Path(place).exists() and not list(here.glob(".*"))
    monkeypatch.undo()
    monkeypatch.chdir(here)
    denoisers.save(experiment.model, params, "place", layout="lpl_jax")

    def stopped(*_):
        assert not Path("new").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(import_run, "to_dict", lambda experiment: {})
    monkeypatch.setattr(checkpoints.Checkpointer, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        import_run.import_run("place", experiment, Path("new"))
    assert not Path("new").exists() and not list(here.glob(".*"))


def test_what_a_killed_write_leaves_is_refused(here, capsys):
    call("export --workdir labels --out place --layout lpl_jax", capsys)
    Path("place/config.json").unlink()  # it is written last
    Path("place").rename(".place.1.partial")
    with pytest.raises(InputError, match="config.json does not exist"):
        denoisers.load(".place.1.partial")
    call("export --workdir labels --out place --layout lpl_jax", capsys)
    assert load_file("place/model.safetensors")
