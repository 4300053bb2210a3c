"""configs/paper.py: every named row resolves, says where it is from, and takes a step at tiny size."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest

from lpl_jax import autoencoders, denoisers
from lpl_jax.autoencoders import AutoencoderConfig
from lpl_jax.configs import paper
from lpl_jax.cost import flops
from lpl_jax.errors import InputError
from lpl_jax.evaluation.cards import METRICS
from lpl_jax.experiment import build, resolve
from lpl_jax.fields import TO_BE_GIVEN
from lpl_jax.losses import latent_lpips_weights
from lpl_jax.losses.latent_lpips import shapes
from lpl_jax.parallel import MeshConfig, make_mesh
from lpl_jax.text import TextSource, load_conditioner
from lpl_jax.training import Frozen, LPLTerm, ReweightingTerm, create_state, make_objective, train_step
from lpl_jax.training.optimizer import make_optimizer

BATCH, SIDE, LENGTH = 4, 4, 5


def tiny(name, autoencoder):
    """The experiment of a row with a network of the same kind and few channels, and a batch of latents."""
    config = started(name)
    if config.comparison.kind == "latent_lpips":
        config.comparison.network = "given"
    config.model.hidden, config.model.heads = 8, 2
    if config.text.source is None:
        config.model.num_classes = 4
    else:
        config.text.source, config.text.length = "bundled", LENGTH
    if config.comparison.block is None:  # the others name one of 28 blocks
        config.model.depth = 2
    config.train.batch_size = BATCH
    if isinstance(config.loss.lpl_capacity, int):  # of a batch of full size
        config.loss.lpl_capacity = 2
    experiment = dataclasses.replace(build(config), resolution=SIDE * 8)
    return resolve(experiment, autoencoder.config, text()[0].clip.config.text if experiment.text else None)


@pytest.fixture(scope="module")
def autoencoder(tiny_folder):
    return autoencoders.load(tiny_folder)


@functools.cache
def params_of(model):
    shapes = jax.eval_shape(functools.partial(denoisers.init, model), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: (0.05 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)


@functools.cache
def lpips():
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: np.abs(0.05 * rng.standard_normal(s.shape)).astype(np.float32), shapes(4))
    return latent_lpips_weights.LatentLPIPS(params)


@functools.cache
def text():
    return load_conditioner(TextSource("bundled", length=LENGTH))


def network_of(experiment):
    kind = experiment.comparison.kind if experiment.comparison else None
    return {"latent_lpips": lpips, "self_perceptual": lambda: params_of(experiment.model)}.get(kind, lambda: None)()


def step_of(name, autoencoder):
    """(jitted step, its arguments) of a row at tiny size."""
    experiment = tiny(name, autoencoder)
    objective = make_objective(experiment)
    optimizer, _ = make_optimizer(experiment.optimizer)
    state = create_state(
        lambda given: given,
        optimizer,
        experiment.ema.decays,
        make_mesh(MeshConfig(), jax.devices()[:1]),
        params_of(experiment.model),
        lpl_weight=0.5,
        with_variances=isinstance(objective.term, ReweightingTerm),
    )
    rng = np.random.default_rng(1)
    batch = {
        "mean": rng.standard_normal((BATCH, SIDE, SIDE, 4)).astype(np.float32),
        "logvar": np.full((BATCH, SIDE, SIDE, 4), -6, np.float32),
        "label": np.arange(BATCH, dtype=np.int32),
    }
    if experiment.model.control:
        batch["control"] = np.tile(np.float32([400, 500, 0, 50]), (BATCH, 1))
    conditioner, tokenizer = text() if experiment.text else (None, None)
    if experiment.text:
        batch["tokens"] = tokenizer(["a kitten", "a wall", "flowers", ""], LENGTH)
    options = dict(objective=objective, optimizer=optimizer, ema_start=experiment.ema.start)
    step = jax.jit(functools.partial(train_step, **options))
    return step, (state, batch, jax.random.key(0), Frozen(autoencoder, network_of(experiment), conditioner))


def check_metrics(metrics, name):
    row = paper.ROWS[name]
    assert ("lpl" in metrics) == ("lpl" in row.arguments.split(","))
    assert ("comparison" in metrics) == (row.changes.get("comparison.kind") in ("latent_lpips", "self_perceptual"))


@pytest.mark.parametrize("name", paper.ROWS)
def test_row_resolves(name, autoencoder):
    row = paper.ROWS[name]
    assert row.name == name and row.where
    assert set(row.paper) | set(row.gain) <= set(METRICS)
    assert row.against in (None, *paper.ROWS) and (row.against or not row.gain)
    assert row.init is None or row.init in paper.ROWS
    experiment = tiny(name, autoencoder)
    assert (experiment.train.init_from is None) == (row.init is None)
    term = make_objective(experiment).term
    assert isinstance(term, LPLTerm | ReweightingTerm) == ("lpl" in row.arguments.split(","))


def take_a_step(name, autoencoder):
    step, arguments = step_of(name, autoencoder)
    state, metrics = step(*arguments)
    assert int(state.step) == 1
    chex.assert_tree_all_finite(metrics)
    check_metrics(metrics, name)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), arguments[0].params, state.params)
    assert any(jax.tree.leaves(moved))
    return state


# One of each kind of step; the others, and those that take long to compile, are left to `test_every_row_takes_a_step`.
KINDS = ("table2_cc12m256_lpl", "table6_eq15")


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_rows_take_a_step(name, autoencoder):
    state = take_a_step(name, autoencoder)
    assert (state.variances is not None) == (name == "table6_eq15")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in paper.ROWS if not name.startswith(paper.VARIANT)])
def test_every_row_takes_a_step(name, autoencoder):
    take_a_step(name, autoencoder)
    jax.clear_caches()


def test_rows_on_captions_follow_the_recipe_of_classes():
    """The same but for data, condition and autoencoder; CLIP ViT-L/14 and its 77 tokens."""
    for size, steps in (("256", 200_000), ("512", 120_000)):
        ours, theirs = (build(started(f"table2_{name}{size}_lpl")) for name in ("cc12m", "imagenet"))
        assert ours.text.source == "openai/clip-vit-large-patch14" and ours.text.length == 77
        assert (ours.train.steps, ours.train.batch_size) == (steps, {"256": 1024, "512": 256}[size])
        for section in (
            "resolution",
            "autoencoder",
            "paradigm",
            "loss",
            "lpl",
            "optimizer",
            "ema",
            "train",
            "sampling",
        ):
            assert getattr(ours, section) == getattr(theirs, section), section


def started(name):
    config = paper.get_config(name)
    for field in ("init_from", "weight_from"):
        if config.train[field] == TO_BE_GIVEN:
            config.train[field] = "given"
    return config


def test_names_that_are_not_there_are_refused():
    with pytest.raises(InputError, match="configs/paper.py does not take 'table99'"):
        paper.get_config("table99")


@pytest.mark.parametrize("name", paper.ROWS)
def test_what_a_row_starts_from_is_there(name):
    """The row before it keeps the checkpoint, and calibrates the weight itself."""
    row, before = paper.ROWS[name], list(paper.ROWS)[: list(paper.ROWS).index(name)]
    assert {row.init, row.weight} <= {None, *before}
    config = started(name)
    if row.init and row.changes.get("comparison.kind") != "latent_lpips":
        start = build(started(row.init)).train
        assert (build(config).train.init_step or start.steps) in start.kept_steps()
    if row.weight:
        source = paper.ROWS[row.weight]
        assert source.weight is None and "lpl.weight" not in source.changes
        assert source.arguments.split(",")[:2] == row.arguments.split(",")[:2]  # size and paradigm


def test_fig21_starts_from_200k_steps_of_the_pre_training():
    for name in ("figure21_base", "figure21_lpl"):
        settings = build(started(name)).train
        assert (paper.ROWS[name].init, settings.init_step, settings.steps) == ("pretrain_eps", 200_000, 100_000)


def test_table9_is_the_baseline():
    for name in ("table9_eps", "table9_flow"):
        experiment = build(started(name))
        assert experiment.lpl is None and experiment.comparison is None
        assert (experiment.sampling.steps, experiment.evaluation.num_images) == (250, 50_000)
        assert experiment.evaluation.prdc_references == 50_000 and paper.ROWS[name].training_set


SWEPT = ("lpl.tau", "lpl.taps", "lpl.stats", "lpl.stats_grad", "lpl.omega", "lpl.mask_layers", "lpl.mask_on")


def test_rows_of_a_sweep_hold_the_weight_and_have_a_variant_that_does_not():
    swept = [row for row in paper.ROWS.values() if set(row.changes) & set(SWEPT)]
    held = [row for row in swept if not row.name.startswith(paper.VARIANT) and row.name != "figure7_rgb"]
    assert len(held) > 20 and all(row.weight in paper.DEFAULT_LPL.values() for row in held)
    for row in held:
        variant = paper.ROWS[paper.VARIANT + row.name]
        assert variant.weight is None and variant.changes == row.changes
        assert variant.figure == paper.VARIANT + row.figure
    assert build(started("figure14_lpl")).loss.lpl_start == 0  # from scratch, where nothing can be calibrated


def test_every_run_is_sampled_from_its_own_average():
    for name, row in paper.ROWS.items():
        if row.changes.get("comparison.kind") == "latent_lpips":
            continue
        experiment = build(started(name))
        with_lpl = experiment.lpl is not None and experiment.comparison is None
        own = {False: "0.9999", True: "0.99975"}[with_lpl] if experiment.ema.decays else None
        assert experiment.sampling.weights == own, name


def test_rows_on_captions_take_as_many_samples_as_references():
    for name, row in paper.ROWS.items():
        if row.dataset != "imagenet":
            count = build(started(name)).evaluation.num_images
            assert count == (10_000 if name.startswith("figure4_") else "auto")


def test_costs_of_table_5_are_with_the_asymmetric_autoencoder():
    """App. A.4; the FID values are those of the ablations, with SDXL's."""
    rows = [row for row in paper.ROWS.values() if row.where.startswith("Table 5")]
    assert len(rows) == 14
    for row in rows:
        assert (row.autoencoder == paper.ASYMMETRIC) == bool(row.cost) == (not row.paper)


IMAGENET_COSTS = [name for name, row in paper.ROWS.items() if paper.TFLOP in row.cost and row.dataset == "imagenet"]


@pytest.mark.parametrize("name", IMAGENET_COSTS)
def test_operations_of_rows_are_the_printed_ones(name):
    """Tables 7 and 8 on ImageNet, 16 GPUs. With LPL one share of decoded images gives the printed numbers."""
    experiment = build(started(name))
    model = dataclasses.replace(experiment.model, control=True)  # as all that is printed

    def ours(share):
        parts = flops.step_flops(flops.PAPER, model, AutoencoderConfig(), experiment.resolution, decoded=share)
        return experiment.train.batch_size / 16 * parts.total / 1e12

    printed = paper.ROWS[name].cost[paper.TFLOP]
    if experiment.lpl is None:
        assert round(ours(0), 3) == printed
    else:
        assert 0.306 < (printed - ours(0)) / (ours(1) - ours(0)) < 0.307


def test_tables_and_figures_are_complete():
    """What the paper trains for Tables 2 to 9 and Figures 6 to 21."""
    places = " ".join(row.where for row in paper.ROWS.values())
    for dataset in ("ImageNet", "CC12M", "S320M"):
        assert f"Table 2, {dataset}" in places and f"Table 8, {dataset}" in places
    for number in range(2, 10):
        assert f"Table {number}," in places
    for number in (4, 6, 7, 8, 9, 10, 18, 19, 20, 21):
        assert f"Fig. {number}" in places
    for both in ("Fig. 14 and 16", "Fig. 15 and 17"):
        assert both in places
