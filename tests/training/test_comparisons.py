"""Runs with the paper's comparison losses: calibrated, trained, resumed; and what is refused."""

import jax
import numpy as np
import pytest

from lpl_jax.errors import InputError
from lpl_jax.experiment import build
from lpl_jax.losses import ComparisonConfig, LatentLPIPS, latent_lpips_weights
from lpl_jax.losses.latent_lpips import shapes
from lpl_jax.runs import checkpoints
from lpl_jax.training import train
from lpl_jax.training.logging import read_metrics


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory):
    """LatentLPIPS with random weights, as a file."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: np.abs(0.05 * rng.standard_normal(s.shape)).astype(np.float32), shapes(4))
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    latent_lpips_weights.save(LatentLPIPS(params), path)
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_config):
    """A run to start from."""
    workdir = tmp_path_factory.mktemp("start") / "run"
    train(build(tiny_config(train__steps=1)), workdir)
    return workdir


@pytest.mark.slow
def test_self_perceptual_run_is_calibrated_and_reports_its_share(start, tiny_config, tmp_path):
    config = tiny_config(train__steps=2, train__init_from=str(start))
    config.comparison.kind, config.comparison.block = "self_perceptual", 1
    result = train(build(config), tmp_path)
    (line,) = read_metrics(tmp_path)
    assert float(result.state.lpl_weight) > 0
    assert line["loss"] == pytest.approx(
        line["diffusion_loss"] + float(result.state.lpl_weight) * line["comparison"], rel=1e-5
    )
    assert 0 < line["comparison_share"] < 1
    config.train.steps = 3
    assert train(build(config), tmp_path).step == 3  # the frozen network is found again


@pytest.mark.slow
def test_gated_latent_lpips_run(lpips_file, tiny_config, tmp_path):
    config = tiny_config(64, train__steps=2, loss__lpl_start=1, train__log_every=1)
    config.comparison.kind, config.comparison.network = "latent_lpips", str(lpips_file)
    config.comparison.tau, config.comparison.tau_ref_resolution = 3.0, 64
    train(build(config), tmp_path)
    before, line = read_metrics(tmp_path)
    assert line["comparison"] > 0 and "comparison" not in before


@pytest.mark.slow
def test_reweighting_run_keeps_its_variances(tiny_config, with_lpl, tmp_path):
    config = tiny_config(train__steps=2, lpl__taps=1, **with_lpl)
    config.comparison.kind = "reweighting"
    first = train(build(config), tmp_path).state.variances
    assert 1 <= float(first.batches) <= 2 and float(first.diffusion) > 0
    config.train.steps = 4
    second = train(build(config), tmp_path).state.variances
    assert float(second.batches) > float(first.batches)
    assert checkpoints.steps(tmp_path / "checkpoints")[-1] == 4
    assert all(line["loss"] > line["diffusion_loss"] for line in read_metrics(tmp_path))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(kind="vgg"), "kind='vgg' is not possible: it must be one of latent_lpips, self_perceptual, reweighting"),
        (dict(kind="latent_lpips"), "needs comparison.network"),
        (dict(kind="self_perceptual"), "needs comparison.block"),
        (dict(kind="self_perceptual", block=3, network="x"), "block=3 of a model with 2 blocks"),
        (dict(kind="reweighting", weight=1.0), "weight is given, but comparison.kind='reweighting' has no use"),
        (dict(kind="reweighting"), "needs the LPL whose variance it takes"),
        (dict(kind="latent_lpips", network="x", tau=1.0), "tau_ref_resolution are given together"),
        (dict(kind="latent_lpips", network="x", weight=1.0, variance_share=0.1), "give one of the two"),
        (dict(kind="none", block=1), "comparison.block is given, but comparison.kind is 'none'"),
    ],
)
def test_configs_that_cannot_be(tiny_config, fields, message):
    config = tiny_config()
    config.comparison.update(fields)
    with pytest.raises(InputError, match=message):
        build(config)


def test_a_comparison_stands_in_place_of_lpl(tiny_config, with_lpl):
    config = tiny_config(**with_lpl)
    config.comparison.kind, config.comparison.network = "latent_lpips", "x"
    with pytest.raises(InputError, match="stands in place of LPL"):
        build(config)


def test_networks_that_are_not_there(tiny_config, tmp_path):
    config = tiny_config(loss__lpl_start=1)
    config.comparison.kind, config.comparison.block = "self_perceptual", 1
    with pytest.raises(InputError, match="needs a trained denoiser: give comparison.network or train.init_from"):
        train(build(config), tmp_path / "a")
    config.comparison.kind, config.comparison.block = "latent_lpips", None
    config.comparison.network = str(tmp_path / "none.pth")
    with pytest.raises(InputError, match="none.pth"):
        train(build(config), tmp_path / "b")


def test_gate_of_a_comparison_grows_with_the_image():
    config = ComparisonConfig("latent_lpips", network="x", tau=3.0, tau_ref_resolution=512)
    assert config.tau_at(256) == 1.5 and ComparisonConfig("latent_lpips", network="x").tau_at(256) == np.inf
    assert config.variance_share == 0.1
