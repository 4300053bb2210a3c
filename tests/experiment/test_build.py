"""Configs: documented, complete, checked; and the experiment that they turn into."""

import dataclasses
import itertools
import re
from pathlib import Path

import pytest

from lpl_jax.autoencoders import AutoencoderConfig
from lpl_jax.configs import base, imagenet, quickstart
from lpl_jax.denoisers import MMDiTConfig
from lpl_jax.diffusion import PARADIGMS
from lpl_jax.errors import InputError
from lpl_jax.experiment import build, resolve, to_dict
from lpl_jax.losses import LPLConfig
from lpl_jax.text import TextSource

ROOT = Path(base.__file__).parents[1]


def started(config):
    """With the run named that post-training starts from."""
    if config.train.init_from == "":
        config.train.init_from = "runs/base"
    return config


def test_post_training_needs_a_run_to_start_from():
    for config in (quickstart.get_config("post,lpl"), imagenet.get_config("512,post")):
        with pytest.raises(InputError, match="give train.init_from"):
            build(config)


def test_every_field_of_the_base_config_has_a_comment():
    lines = (ROOT / "configs/base.py").read_text().splitlines()
    fields = [line for line in lines if re.match(r"    c\.[\w.]+ = ", line)]
    assert len(fields) > 80
    assert [line for line in fields if not re.search(r"  # .{6,}", line)] == []


def test_the_base_config_names_every_field_of_its_parts():
    config = base.get_config().to_dict()

    def names(cls):
        return {field.name for field in dataclasses.fields(cls)}

    # Not offered: what the data and the text tower decide, and what only ported checkpoints have.
    absent = {"latent_channels", "context_dim", "pooled_dim", "qk_norm", "position_table", "dual_attention"}
    assert names(MMDiTConfig) - set(config["model"]) <= absent
    assert set(config["model"]) - {"preset"} <= names(MMDiTConfig)
    assert names(LPLConfig) - set(config["lpl"]) == set()
    assert set().union(*(names(cls) for cls in PARADIGMS.values())) - set(config["paradigm"]) == set()
    experiment = build(config)
    assert names(TextSource) == set(config["text"])
    for section in ("data", "autoencoder", "loss", "optimizer", "ema", "mesh", "train", "sampling", "evaluation"):
        assert names(type(getattr(experiment, section))) == set(config[section]), section


@pytest.mark.parametrize("arguments", ["", "post", "post,lpl"])
def test_quickstart_configs_build_and_survive_json(arguments):
    experiment = build(started(quickstart.get_config(arguments)))
    assert build(to_dict(experiment)) == experiment
    assert (experiment.lpl is not None) == ("lpl" in arguments)


@pytest.mark.parametrize("size, process", itertools.product(("256", "512"), ("eps", "v", "flow")))
def test_imagenet_configs_build(size, process):
    for extra in ("", "lpl", "post,lpl", "post,reference", "lpl,economical", "xl_two_stream"):
        experiment = build(started(imagenet.get_config(f"{size},{process},{extra}")))
        assert build(to_dict(experiment)) == experiment
        assert experiment.resolution == int(size)
        assert experiment.paradigm.name == process
        assert experiment.paradigm.schedule_rescale == int(size) / 256
        if extra == "post,lpl":
            assert experiment.lpl.tau_at(experiment.resolution) == pytest.approx(3 * int(size) / 512)


def test_economical_is_of_a_perceptual_loss():
    loss = build(imagenet.get_config("512,lpl,economical")).loss
    assert (loss.lpl_capacity, loss.stratified_t) == ("economical", True)
    with pytest.raises(InputError, match="economical.*add lpl or reference"):
        imagenet.get_config("512,economical")


def test_the_same_timesteps_are_active_at_both_sizes():
    small, large = (build(imagenet.get_config(f"{size},lpl")) for size in (256, 512))
    fractions = [e.paradigm.active_fraction(e.lpl.tau_at(e.resolution)) for e in (small, large)]
    assert fractions[0] == fractions[1] == 0.478


def test_resolve_takes_channels_from_the_autoencoder():
    experiment = build(quickstart.get_config())
    resolved = resolve(experiment, AutoencoderConfig.tiny(latent_channels=16))
    assert resolved.model.latent_channels == 16


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resolution": 0}, "resolution=0"),
        ({"seed": -1}, "seed=-1"),
        ({"nonsense": 1}, "config section='nonsense'.*one of seed"),
        ({"train.typo": 1}, "field of train='typo'.*batch_size"),
        ({"train.batch_size": 0}, "train.batch_size=0"),
        ({"model.preset": "huge"}, "'huge'.*paper796"),
        ({"model.heads": 5}, "heads"),
        ({"paradigm.name": "ddpm"}, "eps, v, flow"),
        ({"paradigm.zero_terminal_snr": True}, "zero_terminal_snr=True is impossible with 'eps'"),
        ({"paradigm.mode_scale": 1.0}, "'eps' has no option mode_scale"),
        ({"lpl.weight": 1.0}, "lpl.weight is given, but lpl.preset is 'none'"),
        ({"lpl.preset": "papier"}, "'papier'"),
        ({"lpl.preset": "paper", "lpl.tau": 1.0}, "lpl.tau=1.0 has no unit"),
        ({"lpl.preset": "paper", "loss.lpl_capacity": 300}, "lpl_capacity=300 is more than train.batch_size=256"),
        ({"loss.lpl_capacity": "some"}, "auto, economical, all, or a number"),
        ({"loss.lpl_groups": "0"}, "auto, or a number of groups"),
        ({"loss.lpl_groups": 3}, "lpl_groups=3 does not divide train.batch_size=256 / train.accumulate=1"),
        ({"loss.lpl_chunk": -1}, "lpl_chunk=-1 is not possible"),
        ({"loss.weighting": "snr"}, "none, min_snr"),
        ({"sampling.sampler": "euler"}, "sampler='euler' with paradigm 'eps'; possible: ddim"),
        ({"mesh.data": 0}, "mesh.data"),
        ({"optimizer.schedule": "linear"}, "schedule"),
    ],
)
def test_contradictions_are_named(changes, message):
    config = base.get_config().to_dict()
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        (config[section] if section else config)[field] = value
    with pytest.raises(InputError, match=message) as caught:
        build(config)
    assert "\n" not in str(caught.value)


def test_patches_must_fit():
    experiment = build(quickstart.get_config())
    odd = dataclasses.replace(experiment, resolution=72)  # 9 x 9 latents, patches of 2
    with pytest.raises(InputError, match="patch_size = 2"):
        resolve(odd, AutoencoderConfig.tiny())
    with pytest.raises(InputError, match="resolution=60 is not divisible by 8"):
        resolve(dataclasses.replace(experiment, resolution=60), AutoencoderConfig.tiny())


def test_capacity():
    loss = build(base.get_config()).loss
    assert loss.capacity(100, 0.478, 1) == 53  # 1.1 x 47.8, rounded up
    assert loss.capacity(100, 0.478, 10) == 60  # equal parts of the groups
    assert loss.capacity(4, 1.0, 1) == loss.capacity(4, 1.0, 4) == 4
    assert loss.capacity(16, 0.0, 4) == 4
    assert dataclasses.replace(loss, lpl_capacity="all").capacity(100, 0.5, 4) is None
    assert dataclasses.replace(loss, lpl_capacity="7").capacity(100, 0.5, 4) == 7
    economical = dataclasses.replace(loss, lpl_capacity="economical")
    assert [economical.capacity(256, 0.5, groups) for groups in (1, 8, 16, 64)] == [21, 16, 16, 64]
    assert economical.capacity(1, 0.5, 1) == 1


def test_groups_and_chunk():
    loss = build(base.get_config()).loss
    assert (loss.groups(8), loss.chunk) == (8, None)
    given = dataclasses.replace(loss, lpl_groups="16", lpl_chunk=2)
    assert (given.groups(8), given.chunk) == (16, 2)


@pytest.mark.parametrize(
    ("platform", "name", "dtype"),
    [("cpu", "xla", "float32"), ("tpu", "splash", "bfloat16"), ("cuda", "cudnn", "bfloat16")],
)
def test_attention_follows_the_platform_and_is_recorded(platform, name, dtype):
    experiment = build(imagenet.get_config("512,lpl"), platform=platform)
    assert (experiment.model.attention, experiment.model.dtype) == (name, dtype)
    assert to_dict(experiment)["model"]["attention"] == name
    assert build(to_dict(experiment), platform=platform) == experiment


def test_attention_that_the_platform_lacks_is_refused():
    config = imagenet.get_config("512")
    config.model.attention = "splash"
    with pytest.raises(InputError, match="model.attention='splash': .* runs on cpu; possible here: auto, xla"):
        build(config)
