"""docs/weights.md: its commands in their order, its Python, and its tables; and weights that a run starts from."""

import dataclasses
import functools
import json
import os
import re
import signal
from pathlib import Path

import chex
import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import lpl_jax
from lpl_jax import denoisers
from lpl_jax.errors import InputError
from lpl_jax.experiment import build
from lpl_jax.parallel import make_mesh
from lpl_jax.runs import checkpoints, open_run
from lpl_jax.text import TextSource
from lpl_jax.tools import config_file, import_run, verbs
from lpl_jax.training import loop, train

DOCUMENT = Path(lpl_jax.__file__).parents[1] / "docs/weights.md"
QUICKSTART = """
from lpl_jax.configs import base

def get_config(arguments=""):
    c = base.get_config()
    c.resolution, c.data.store, c.autoencoder.source = 32, {store!r}, {autoencoder!r}
    c.model.hidden, c.model.depth, c.model.heads, c.model.num_classes, c.model.base_grid = 16, 1, 2, 2, 2
    c.model.context_pre_only = False
    c.train.batch_size, c.train.steps, c.train.log_every = 8, 1, 1
    if arguments == "post,lpl":
        c.train.init_from = "???"
        c.lpl.preset, c.lpl.tau, c.lpl.tau_ref_resolution = "paper", 3.0, 32
    return c
"""


def documented(language):
    """The code blocks of the document: indented commands, or the fenced blocks of a language."""
    if language == "commands":
        return re.findall(r"^    lpl (.+)$", DOCUMENT.read_text().replace("\\\n", " "), re.M)
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory, stores, tiny_folder, write_run):
    """What the document's commands start from."""
    place = tmp_path_factory.mktemp("document")
    (place / "configs").mkdir()
    text = QUICKSTART.format(store=str(stores[32]), autoencoder=str(tiny_folder))
    (place / "configs/quickstart.py").write_text(text)
    experiment = build(config_file.load(str(place / "configs/quickstart.py")))
    write_run(place / "runs/base", experiment, (1000, 2000))
    model = dataclasses.replace(experiment.model, num_classes=0, context_dim=8, pooled_dim=8, context_pre_only=True)
    text = dataclasses.replace(experiment, model=model, text=TextSource("bundled"))
    write_run(place / "runs/text", text, (1000,))
    return place


def test_the_documented_commands(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    one_device = functools.partial(make_mesh, devices=jax.devices()[:1])  # eight take long to compile for
    monkeypatch.setattr(loop.parallel, "make_mesh", one_device)
    commands = documented("commands")
    assert len(commands) == 6
    tuned = {}
    for command in commands:
        with monkeypatch.context() as patch:
            if "runs/tuned" in command:  # up to the first step, whose loss another test compiles
                patch.setattr(loop, "term_weight", lambda *_, **__: 2.0)
                patch.setattr(loop, "_compiled", step_without_compiling(tuned))
            assert verbs.main(command.split()) == 0, command
    want = open_run("runs/base").params()
    chex.assert_trees_all_equal(tuned["state"].params, want)
    chex.assert_trees_all_equal(tuned["state"].emas["0.9999"], want)
    assert float(tuned["state"].lpl_weight) == 2
    # The imported run has made its step from the weights: AdamW's first, in the warm-up, is 1e-7 at most.
    assert checkpoints.steps("runs/imported/checkpoints") == [0, 1]
    trained = open_run("runs/imported").params(weights="params")
    assert 0 < optax.tree.norm(optax.tree.sub(trained, want), ord="inf") < 1e-6
    kinds = {"raw": "lpl_jax.MMDiT", "transformer": "SD3Transformer2DModel"}
    for name, kind in kinds.items():
        assert json.loads(Path("exports", name, "config.json").read_text())["_class_name"] == kind
    # Its Python.
    found = {}
    for code in documented("python"):
        exec(code, found)
    chex.assert_trees_all_equal(denoisers.load("exports/copy")[1], want)
    assert found["config"]["hidden"] == 16
    np.testing.assert_array_equal(found["tensors"]["blocks/mlp/fc1/kernel"], want["blocks"]["mlp"]["fc1"]["kernel"])


def rows(heading):
    """(path, {tensor: shape in letters}) of each row of the table that follows a paragraph with this beginning."""
    table = DOCUMENT.read_text().split(heading)[1].split("\n\n")[1].replace("\\*", "*")
    for path, tensors in re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", table, re.M):
        yield path, dict(re.findall(r"(\w+) \(([^)]*)\)", tensors))


@pytest.mark.parametrize("name", [*denoisers.PRESETS, "text", "all dual"])
def test_the_documented_layout(name):
    """Every parameter of every preset is in the tables, with its shape."""
    text = denoisers.MMDiTConfig(hidden=64, depth=3, heads=4, context_dim=24, pooled_dim=40, control=True)
    others = {
        "text": dataclasses.replace(text, dual_attention=1, position_table=6),
        "all dual": dataclasses.replace(text, dual_attention=3, mlp_ratio=3, latent_channels=16),
    }
    config = others.get(name) or denoisers.preset(name)
    outside, inside = list(rows("Letters:")), list(rows("Blocks: the first"))
    shapes = flatten_dict(jax.eval_shape(lambda: denoisers.init(config, jax.random.key(0))), sep="/")
    unknown = []
    for path, leaf in shapes.items():
        group, _, rest = path.partition("/")
        stacked = group in config.stacks
        table, rest = (inside, rest) if stacked or group == "last_block" else (outside, path)
        module, _, tensor = rest.rpartition("/")
        module = re.sub("^(context|second)_attn/", "attn/", module).replace("context_mlp/", "mlp/")
        dual = group == "dual_blocks" or (group == "last_block" and config.dual_attention == config.depth)
        letters = dict(d=config.hidden, e=config.head_dim, m=config.mlp_ratio, p=config.patch_size)
        letters |= dict(C=config.latent_channels, K=config.num_classes, T=config.context_dim, P=config.pooled_dim)
        letters |= dict(S=config.position_table, i=9 if dual else 6)
        letters |= dict(c=2 if group == "last_block" else config.context_modulation_chunks)
        possible = [
            tuple(eval(side, letters) for side in tensors[tensor].split(","))
            for row, tensors in table
            if row == module and tensor in tensors
        ]
        if possible != [leaf.shape[stacked:]]:
            unknown.append((path, leaf.shape, possible))
    assert unknown == []


def step_without_compiling(seen, then=lambda: None):
    """What stands for compiling the step: one that only counts, and keeps what state it was given."""

    def step(state, *_):
        seen.update(state=jax.device_get(state))
        then()
        return state.replace(step=state.step + 1), {"loss": np.float32(1)}

    return lambda *_: step


def test_the_perceptual_loss_is_weighed_once_where_an_imported_run_begins(
    place, tmp_path, tiny_config, with_lpl, monkeypatch
):
    run = open_run(place / "runs/base")
    experiment, params = run.experiment, run.params()
    denoisers.save(experiment.model, params, tmp_path / "one.safetensors")
    config = tiny_config(
        model__depth=1, model__context_pre_only=False, ema__decays=(), **with_lpl | dict(lpl__weight=None)
    )
    experiment = build(config)
    import_run.import_run(str(tmp_path / "one.safetensors"), experiment, tmp_path / "run")
    weighed, seen = [], {}

    def weigh(*_, **__):
        weighed.append(1)
        return 2.0

    def signalled():
        os.kill(os.getpid(), signal.SIGTERM)

    one_device = functools.partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(loop.parallel, "make_mesh", one_device)
    monkeypatch.setattr(loop, "term_weight", weigh)
    monkeypatch.setattr(loop, "_compiled", step_without_compiling(seen, signalled))
    for steps in (1, 2):  # stopped behind the first step, and begun again
        assert train(experiment, tmp_path / "run").step == steps
        assert (float(seen["state"].lpl_weight), weighed) == (2.0, [1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model__depth": 2},
            ["train.init_from=one.safetensors", "depth = 1 there, 2 in", "has shape (1, "],
        ),
        ({"train__init_weights": "0.5"}, ["train.init_weights='0.5'", "'params'"]),
        (
            {"train__init_from": "nowhere.safetensors"},
            ["init_from=nowhere.safetensors: not the folder of a run"],
        ),
    ],
)
def test_weights_that_a_run_cannot_start_from(changes, words, place, tmp_path, tiny_config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = open_run(place / "runs/base")
    experiment, params = run.experiment, run.params()
    denoisers.save(experiment.model, params, "one.safetensors")
    config = tiny_config(
        **{"model__depth": 1, "model__context_pre_only": False, "train__init_from": "one.safetensors"} | changes
    )
    with pytest.raises(InputError) as error:
        train(build(config), "run")
    assert [word for word in words if word not in str(error.value)] == []
    assert not Path("run/config.json").exists()
