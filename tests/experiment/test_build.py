"""Configs: documented, complete, checked; and the experiment that they turn into."""

import dataclasses
import itertools
from pathlib import Path

import pytest

from lpl_jax.autoencoders import AutoencoderConfig
from lpl_jax.configs import base, imagenet, quickstart
from lpl_jax.diffusion import PARADIGMS
from lpl_jax.errors import InputError
from lpl_jax.experiment import build, documentation, is_optional, narrow_gate, resolve, to_dict
from lpl_jax.experiment.sections import SECTIONS, entries
from lpl_jax.fields import TO_BE_GIVEN
from lpl_jax.losses import ComparisonConfig, LPLConfig
from lpl_jax.text import TextSource

ROOT = Path(base.__file__).parents[2]


def started(config):
    """With the run named that post-training starts from."""
    if config.train.init_from == TO_BE_GIVEN:
        config.train.init_from = "runs/base"
    return config


def test_post_training_needs_a_run_to_start_from():
    for config in (quickstart.get_config("post,lpl"), imagenet.get_config("512,post")):
        with pytest.raises(InputError, match="train.init_from has to be given"):
            build(config)


def test_a_config_offers_every_field_but_what_the_frozen_networks_decide():
    config, experiment = base.get_config().to_dict(), build(base.get_config())
    text = {"text": TextSource, "lpl": LPLConfig, "comparison": ComparisonConfig}  # None without a choice
    for section in SECTIONS:
        parts = (
            [*PARADIGMS.values()]
            if section == "paradigm"
            else [text.get(section) or type(getattr(experiment, section))]
        )
        fields = {item.name for part in parts for item in dataclasses.fields(part) if not item.metadata["derived"]}
        chosen_by = {"model": {"preset"}, "lpl": {"preset"}, "paradigm": {"name"}}.get(section, set())
        assert set(config[section]) == fields | chosen_by, section
    assert not {"latent_channels", "context_dim", "pooled_dim"} & set(config["model"])


def test_options_of_published_checkpoints_have_flags():
    config = base.get_config()
    config.model.qk_norm, config.model.dual_attention, config.model.position_table = False, 2, 64
    model = build(config).model
    assert (model.qk_norm, model.dual_attention, model.position_table) == (False, 2, 64)


def test_the_document_is_what_the_fields_say():
    """`lpl config > docs/config.md` makes it anew."""
    document = documentation()
    assert (ROOT / "docs/config.md").read_text() == document
    assert max(map(len, document.splitlines())) <= 120
    names = [f"{section}.{name}" for section in SECTIONS for name in base.get_config()[section]]
    assert [name for name in names if document.count(f"- `{name}` (") != 1] == []


FIELDS = [(section, name, entry) for section in SECTIONS for name, entry in entries(section).items()]
CHOICES = {
    "text": {"source": "bundled"},
    "lpl": {"preset": "paper"},
    "comparison": {"kind": "self_perceptual", "block": 1},
}


@pytest.mark.parametrize(
    ("section", "name", "entry"), FIELDS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_value_of_no_possible_type_is_named(section, name, entry):
    config = base.get_config().to_dict()
    config[section] |= CHOICES.get(section, {}) | {name: object()}
    if section == "paradigm" and name in ("time_sampling", "mode_scale", "logit_mean", "logit_std"):
        config[section]["name"] = "flow"
    with pytest.raises(
        InputError, match=rf"^{section}\.{name}=<object object .*> is not possible.*: it must be .+"
    ) as error:
        build(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("nothing", [None, "", "None"])
def test_nothing_is_none_in_every_optional_field(nothing):
    expected = build(base.get_config())
    for section, name, entry in FIELDS:
        if is_optional(section, name) and section not in CHOICES:
            config = base.get_config().to_dict()
            config[section][name] = nothing
            found = build(config)
            assert found == (
                expected
                if entry.value is None
                else dataclasses.replace(
                    expected, **{section: dataclasses.replace(getattr(expected, section), **{name: None})}
                )
            ), (section, name)


def test_defaults_are_stated_once():
    """What a fresh config holds is what the parts say where nothing is given."""
    assert build(base.get_config()) == build({"resolution": 256, "model": {"attention": "auto", "dtype": "auto"}})


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
        ({"nonsense": 1}, "config section 'nonsense' is not known.*seed"),
        ({"train.typo": 1}, "train.typo is not known.*batch_size"),
        ({"train.batch_size": 0}, "train.batch_size=0"),
        ({"model.preset": "huge"}, "'huge'.*paper796"),
        ({"model.heads": 5}, "heads"),
        ({"paradigm.name": "ddpm"}, "eps, v, flow"),
        ({"paradigm.zero_terminal_snr": True}, "zero_terminal_snr=True is impossible with 'eps'"),
        ({"paradigm.mode_scale": 1.0}, "mode_scale of 'eps' is not known"),
        ({"lpl.weight": 1.0}, "lpl.weight is given, but lpl.preset is 'none'"),
        ({"lpl.preset": "papier"}, "'papier'"),
        ({"lpl.preset": "paper", "lpl.tau": 1.0}, "lpl.tau=1.0 has no unit"),
        ({"loss.lpl_start": 5}, "loss.lpl_start=5 is given, but there is no LPL"),
        ({"lpl.preset": "paper", "train.steps": 9, "loss.lpl_start": 9}, "it must be less than train.steps=9"),
        ({"lpl.preset": "paper", "loss.lpl_capacity": 300}, "lpl_capacity=300 is more than train.batch_size=256"),
        ({"loss.lpl_capacity": "some"}, "auto, economical, all, or 1 to 1,048,576"),
        ({"loss.lpl_groups": "0"}, "auto, or 1 to 1,048,576"),
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


def test_a_gate_that_lets_few_timesteps_through_is_remarked_upon():
    """The default of the paper is for 512 px: at 64 px, without the rescaled schedule, little is left of it."""
    config = base.get_config()
    config.resolution, config.lpl.preset = 64, "paper"
    experiment = build(config)
    assert round(100 * experiment.gate_share) == 11
    assert narrow_gate(experiment) == (
        "the gate lets 11 % of the timesteps through: lpl.tau=3 for 512 px is 0.375 at 64 px. "
        "lpl.tau, or lpl.tau_ref_resolution=64, changes that"
    )
    config.lpl.tau, config.lpl.tau_ref_resolution = 3.0, 64
    assert narrow_gate(build(config)) is None
    assert narrow_gate(build(base.get_config())) is None
    config = base.get_config()
    config.comparison.kind, config.comparison.network = "latent_lpips", "x"
    assert narrow_gate(build(config)) is None
    config.comparison.tau, config.comparison.tau_ref_resolution = 0.5, 256
    assert "comparison.tau=0.5 for 256 px" in narrow_gate(build(config))


def test_images_are_sampled_from_an_average_that_there_is():
    config = base.get_config()
    config.ema.decays, config.sampling.weights = (0.9, 0.99), "0.99"
    assert build(config).sampling.weights == "0.99"
    config.ema.decays = (0.9,)
    with pytest.raises(InputError, match=r"sampling.weights='0.99' with ema.decays=\(0.9,\); possible: params, 0.9"):
        build(config)


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16"), ("tpu", "bfloat16")])
def test_the_autoencoder_computes_in_bfloat16_on_accelerators(platform, dtype):
    assert base.get_config().autoencoder.dtype == "auto"
    experiment = build(base.get_config(), platform=platform)
    assert experiment.autoencoder.dtype == to_dict(experiment)["autoencoder"]["dtype"] == dtype
    assert build(to_dict(experiment), platform=platform) == experiment
    assert build({"autoencoder": {"dtype": "float32"}}, platform=platform).autoencoder.dtype == "float32"
    with pytest.raises(InputError, match="autoencoder.dtype"):
        build({"autoencoder": {"dtype": "float16"}}, platform=platform)
