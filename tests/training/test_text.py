"""Training on text: the tower inside the step, dropped prompts, meshes, calibration; and configs that cannot be."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax import autoencoders, denoisers, parallel
from lpl_jax import text as text_models
from lpl_jax.configs import base
from lpl_jax.data import FolderSource, TextOptions, write_store
from lpl_jax.diffusion import paradigm
from lpl_jax.errors import InputError
from lpl_jax.experiment import LossConfig, OptimizerConfig, build, resolve, to_dict
from lpl_jax.losses import ComparisonConfig
from lpl_jax.text import TextSource, load_conditioner
from lpl_jax.training import ComparisonTerm, Frozen, Objective, create_state, losses, train, train_step
from lpl_jax.training.logging import read_metrics
from lpl_jax.training.optimizer import make_optimizer

BATCH, LENGTH = 4, 6
SOURCE = TextSource("bundled", length=LENGTH)
MODEL = denoisers.preset("tiny", hidden=16, depth=2, heads=2, num_classes=0, context_dim=128, pooled_dim=128)


def objective(label_dropout=0.5, term=None):
    loss = LossConfig(label_dropout=label_dropout)
    return Objective(denoisers.MMDiT(MODEL), paradigm("eps"), resolution=32, null_label=0, loss=loss, term=term)


@pytest.fixture(scope="module")
def text():
    return load_conditioner(SOURCE)


@pytest.fixture(scope="module")
def autoencoder(tiny_folder):
    return autoencoders.load(tiny_folder)


@pytest.fixture(scope="module")
def batch(text):
    rng = np.random.default_rng(0)
    return {
        "mean": rng.standard_normal((BATCH, 4, 4, 4)).astype(np.float32),
        "logvar": np.full((BATCH, 4, 4, 4), -6, np.float32),
        "label": np.zeros(BATCH, np.int32),
        "tokens": text[1](["a red bird", "two dogs", "snow", "a long road"], LENGTH),
    }


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(functools.partial(denoisers.init, MODEL), jax.random.key(0))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)


@functools.partial(jax.jit, static_argnames="objective")
def loss(params, batch, autoencoder, text, objective, network=None):
    frozen = Frozen(autoencoder, network, text)
    return losses(params, batch, jax.random.key(3), frozen, objective=objective, weight=1.0)


def test_prompts_count_unless_they_are_dropped(params, batch, autoencoder, text):
    other = batch | {"tokens": text[1](["blue", "green", "yellow", "black"], LENGTH)}
    for dropout, same in ((0.0, False), (1.0, True)):
        chosen = objective(label_dropout=dropout)
        values = [float(loss(params, each, autoencoder, text[0], chosen)[0]) for each in (batch, other)]
        assert (values[0] == values[1]) == same
    empty = batch | {"tokens": text[1]([""] * BATCH, LENGTH)}
    prompts = objective(label_dropout=0.0)
    np.testing.assert_allclose(loss(params, empty, autoencoder, text[0], prompts)[0], values[0], rtol=1e-5)


def test_self_perceptual_features_are_conditioned_on_the_same_prompts(params, batch, autoencoder, text):
    chosen = objective(0.0, ComparisonTerm(ComparisonConfig("self_perceptual", block=1, weight=1.0)))
    other = batch | {"tokens": text[1](["blue", "green", "yellow", "black"], LENGTH)}
    found = [loss(params, each, autoencoder, text[0], chosen, params)[1].means["comparison"] for each in (batch, other)]
    assert np.isfinite(found).all() and found[0] != found[1]


@pytest.mark.slow
def test_meshes_agree(params, batch, autoencoder, text):
    results = []
    for sizes in ((1, 1, 1), (2, 1, 2)):
        mesh = parallel.make_mesh(parallel.MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        optimizer, _ = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=0))
        state = create_state(lambda given: given, optimizer, (0.5,), mesh, jax.tree.map(jnp.array, params))
        step = jax.jit(functools.partial(train_step, objective=objective(), optimizer=optimizer))
        frozen = parallel.put_replicated(Frozen(autoencoder, text=text[0]), mesh)
        key = parallel.put_replicated(jax.random.key(5), mesh)
        with jax.set_mesh(mesh):
            state, metrics = step(state, parallel.put_batch(batch, mesh), key, frozen)
        results.append({name: float(metrics[name]) for name in ("loss", "grad_norm")})
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def config(**changes):
    c = base.get_config()
    c.text.source = "bundled"
    for name, value in changes.items():
        section, _, field = name.partition("__")
        c[section][field] = value
    return c


def test_widths_come_from_the_tower(text, autoencoder):
    experiment = build(config(model__preset="small"))
    assert (experiment.model.num_classes, experiment.model.context_dim) == (0, 768)  # CLIP ViT-L's until it is known
    resolved = resolve(experiment, autoencoder.config, text[0].clip.config.text)
    assert (resolved.model.context_dim, resolved.model.pooled_dim) == (128, 128)
    assert build(to_dict(resolved)) == resolved
    plain = build(config(text__pooled=False))
    assert resolve(plain, autoencoder.config, text[0].clip.config.text).model.pooled_dim == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model__num_classes=10), "model.num_classes=10 is not possible with text.source: leave it out"),
        (dict(text__layer="middle"), "text.layer='middle'"),
        (dict(text__length=0), "text.length=0"),
    ],
)
def test_configs_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        build(config(**changes))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory, image_folder, tiny_folder):
    """A latent store of images with captions."""
    folder, root = tmp_path_factory.mktemp("captions"), tmp_path_factory.mktemp("stores")
    for index, path in enumerate(sorted(image_folder.rglob("*.png"))):
        shutil.copy(path, folder / path.name)
        (folder / path.name).with_suffix(".txt").write_text(f"a {path.parent.name}, number {index}")
    source, autoencoder = FolderSource(folder, 32, captions=("txt",)), autoencoders.load(tiny_folder)
    write_store(root / "store", source, autoencoder, text=TextOptions(length=LENGTH))
    write_store(root / "with_outputs", source, autoencoder, text=TextOptions(length=LENGTH, encoder="bundled"))
    return root / "store"


def captioned_config(tiny_config, captioned, **changes):
    c = tiny_config(data__store=str(captioned), model__num_classes=None, train__steps=2, train__log_every=1)
    c.text.source, c.text.length = "bundled", LENGTH
    for name, value in changes.items():
        section, _, field = name.partition("__")
        c[section][field] = value
    return c


def test_a_run_on_captions_trains(tiny_config, captioned, tmp_path, two_devices):
    """With LPL: `test_paper` and the slow test of captioned photographs."""
    c = captioned_config(tiny_config, captioned)
    assert train(build(c), tmp_path).step == 2
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2] and all(np.isfinite(line["loss"]) for line in lines)
    c.text.layer = "penultimate"
    with pytest.raises(InputError, match="text.layer: was 'last', now 'penultimate'"):
        train(build(c), tmp_path)


@pytest.mark.slow
def test_a_run_on_captions_resumes(tiny_config, captioned, tmp_path, two_devices):
    c = captioned_config(tiny_config, captioned)
    assert train(build(c), tmp_path).step == 2
    c.train.steps = 3
    assert train(build(c), tmp_path).step == 3
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3] and all(np.isfinite(line["loss"]) for line in lines)


@pytest.mark.slow
def test_a_run_on_outputs_of_the_tower_in_the_store(tiny_config, captioned, tmp_path):
    """Losses are those of a run that computes them in its steps, but for their rounding to float16."""
    found = {}
    for where, store in (("step", captioned), ("store", captioned.parent / "with_outputs")):
        c = captioned_config(tiny_config, store, text__embeddings=where)
        assert train(build(c), tmp_path / where).step == 2
        found[where] = [line["loss"] for line in read_metrics(tmp_path / where)]
    np.testing.assert_allclose(found["store"], found["step"], rtol=2e-3)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(text__length=8), "has 6 tokens a caption, but text.length=8"),
        (dict(text__second_caption=0.5), "has one caption column, txt"),
        (dict(text__embeddings="store"), r"needs outputs of the tower of widths \(128, 128\)"),
    ],
)
def test_stores_of_other_captions_are_refused(tiny_config, captioned, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train(build(captioned_config(tiny_config, captioned, **changes)), tmp_path)


def test_states_of_another_tower_of_the_same_widths_are_refused(tiny_config, captioned, tmp_path, monkeypatch):
    params = text_models.bundled._params()
    monkeypatch.setattr(text_models.bundled, "_params", lambda: jax.tree.map(lambda array: 1.1 * array, params))
    c = captioned_config(tiny_config, captioned.parent / "with_outputs", text__embeddings="store")
    with pytest.raises(InputError, match="has states of tower bundled .weights .*, not of bundled .*: prepare it with"):
        train(build(c), tmp_path)


def test_the_identity_of_a_tower_is_that_of_its_weights(text):
    """Whatever the type that it computes in, and with or without what only CLIPScore needs."""
    clip = text_models.load("bundled")
    projected = clip.replace(params={"text": clip.params["text"] | {"projection": {"kernel": np.ones((128, 3))}}})
    same = [clip, text_models.load("bundled", dtype=jnp.bfloat16), projected, text[0].clip]
    assert len({text_models.tower_fingerprint(each) for each in same}) == 1
    other = clip.replace(params=jax.tree.map(lambda array: 1.1 * array, clip.params))
    assert text_models.tower_fingerprint(other) != text_models.tower_fingerprint(clip)


def test_a_store_that_is_not_there_is_not_made_of_images_without_captions(tiny_config, captioned, tmp_path):
    c = captioned_config(tiny_config, tmp_path / "mistyped")
    with pytest.raises(InputError, match="mistyped does not exist, and data.source='photos' has no captions"):
        train(build(c), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_stores_without_captions_or_of_another_tokeniser_are_refused(tiny_config, captioned, tmp_path, monkeypatch):
    c = captioned_config(tiny_config, captioned)
    monkeypatch.setattr(text_models.bundled.HashTokenizer, "fingerprint", 64 * "0")
    with pytest.raises(InputError, match="has tokens of tokeniser bundled .*, not of bundled"):
        train(build(c), tmp_path)
    c.data.store = tiny_config().data.store
    with pytest.raises(InputError, match="has no captions"):
        train(build(c), tmp_path)
