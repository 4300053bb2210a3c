"""The behaviour of an autoencoder that users see: units, shapes, refusals, the pytree, the configurations."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax import autoencoders
from lpl_jax.autoencoders import AutoencoderConfig, TinyAutoencoderConfig
from lpl_jax.autoencoders.diffusers_config import from_diffusers, to_diffusers
from lpl_jax.errors import InputError
from lpl_jax.io.fingerprints import fingerprint

SHALLOW = dict(encoder_channels=(8, 8), decoder_channels=(8, 8), decoder_resnets=1, mid_attention=False)
TAESD = TinyAutoencoderConfig(
    latent_channels=3, encoder_width=8, decoder_width=8, encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1)
)


@pytest.mark.parametrize("config", [AutoencoderConfig.tiny(**SHALLOW), TAESD], ids=["kl", "TAESD"])
def test_fewer_taps_are_a_prefix(config):
    ours = autoencoders.init(config, jax.random.key(0))
    latents = np.random.default_rng(3).normal(size=(1, 4, 4, config.latent_channels)).astype(np.float32)

    @jax.jit
    def prefixes(a, z):
        return [a.features(z, num_taps=count) for count in range(1, config.num_taps + 1)] + [a.features(z)]

    *some, every = prefixes(ours, latents)
    assert len(every) == config.num_taps == 3
    for count, taps in enumerate(some, start=1):
        assert len(taps) == count
        for tap, expected in zip(taps, every, strict=False):
            np.testing.assert_array_equal(tap, expected)
    with pytest.raises(InputError, match="num_taps=4.*1 to 3"):
        ours.features(latents, num_taps=4)


def test_side_of_every_tap(pair):
    latents = jax.ShapeDtypeStruct((1, 2, 3, pair.ours.config.latent_channels), jnp.float32)
    sides = [tap.shape[1:3] for tap in jax.eval_shape(lambda a, z: a.features(z), pair.ours, latents)]
    expected = [(2, 3), (4, 6), (8, 12), (16, 24), (16, 24)]
    assert sides == (expected[:4] if pair.family == "TAESD" else expected)


def test_scale_and_unscale_are_inverse(pair):
    ours = pair.ours
    raw = np.random.default_rng(4).normal(size=(1, 2, 2, ours.config.latent_channels)).astype(np.float32)
    scaled = ours.scale(raw)
    np.testing.assert_allclose(scaled, (raw - ours.config.shift_factor) * ours.config.scaling_factor, rtol=1e-6)
    np.testing.assert_allclose(ours.unscale(scaled), raw, rtol=1e-5, atol=1e-6)


def test_weights_are_arguments_not_constants(pair):
    latents = jnp.zeros((1, 4, 4, pair.ours.config.latent_channels))
    text = jax.jit(lambda a, z: a.decode(z), keep_unused=True).lower(pair.ours, latents).as_text()
    leaves = len(jax.tree.leaves(pair.ours.params["decoder"]))
    assert text.split("\n")[1].count("%arg") >= leaves  # every weight is an argument of main


def test_without_its_encoder_it_decodes(sd):
    alone, latents = sd.ours.without_encoder(), jnp.ones((1, 4, 4, 4))
    assert len(jax.tree.leaves(alone)) == len(jax.tree.leaves(sd.ours.params["decoder"]))
    decode = jax.jit(type(alone).decode)
    np.testing.assert_array_equal(decode(alone, latents), decode(sd.ours, latents))
    with pytest.raises(KeyError, match="encoder"):
        alone.encode(jnp.zeros((1, 32, 32, 3)))


def test_hash_sees_every_weight(sd):
    changed = jax.tree.map(lambda x: x, sd.ours.params)
    changed["decoder"]["conv_out"]["bias"] = changed["decoder"]["conv_out"]["bias"].at[0].add(1e-6)
    assert fingerprint(sd.ours.params) != fingerprint(sd.ours.replace(params=changed).params)


def test_shapes_that_do_not_fit(pair):
    with pytest.raises(InputError, match="30x32 pixels.*divisible by 8"):
        pair.ours.encode(jnp.zeros((1, 30, 32, 3)))
    channels = pair.ours.config.latent_channels
    with pytest.raises(InputError, match=f"latents with {channels + 1} channels"):
        pair.ours.decode(jnp.zeros((1, 4, 4, channels + 1)))


def test_mask_and_image_go_together(make):
    ours = make("asymmetric").ours
    latents, image, mask = jnp.zeros((1, 2, 2, 4)), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 16, 16, 1))
    with pytest.raises(InputError, match=r"mask of shape None; these latents need \(1, 16, 16, 1\)"):
        ours.decode(latents, image=image)
    with pytest.raises(InputError, match=r"image of shape None; these latents need \(1, 16, 16, 3\)"):
        ours.decode(latents, mask=mask)
    with pytest.raises(InputError, match=r"mask of shape \(1, 2, 2, 1\)"):
        ours.decode(latents, image=image, mask=mask[:, ::8, ::8])
    with pytest.raises(InputError, match="is no asymmetric autoencoder"):
        make("SD").ours.decode(latents, image=image, mask=mask)


def test_config_refuses_what_cannot_be():
    with pytest.raises(InputError, match="float16 overflows"):
        AutoencoderConfig(dtype="float16")
    with pytest.raises(InputError, match="width 10 is not divisible by norm_groups=4"):
        AutoencoderConfig.tiny(encoder_channels=(10, 16, 16, 16))
    with pytest.raises(InputError, match="latent_channels=0; possible: whole numbers"):
        AutoencoderConfig.tiny(latent_channels=0)
    with pytest.raises(InputError, match="scaling_factor=0"):
        TinyAutoencoderConfig(scaling_factor=0)
    with pytest.raises(InputError, match="2 encoder levels and 4 decoder levels"):
        TinyAutoencoderConfig(encoder_blocks=(1, 1))
    with pytest.raises(InputError, match="with mask_condition; possible: four widths, each twice"):
        AutoencoderConfig.tiny(mask_condition=True)
    with pytest.raises(InputError, match="mask_condition goes with mid_attention"):
        AutoencoderConfig(mask_condition=True, quant_conv=False)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (
            "SD",
            {"_class_name": "VQModel"},
            "VQModel is not supported; possible: AutoencoderKL, Asymm.*, AutoencoderTiny",
        ),
        ("SD", {"act_fn": "relu"}, "act_fn='relu'"),
        ("SD", {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types"),
        ("SD", {"latents_mean": [0.0] * 4}, "latents_mean"),
        ("SD", {"block_out_channels": 8}, "block_out_channels=8; possible: a list"),
        ("SD", {"block_out_channels": ["a", 8, 8, 8]}, "encoder_channels=.*whole numbers"),
        ("SD", {"scaling_factor": "big"}, "scaling_factor=big"),
        ("SD", {"scaling_factor": 0}, "scaling_factor=0"),
        ("TAESD", {"scaling_factor": None}, "scaling_factor=None"),
        ("asymmetric", {"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"),
        ("TAESD", {"act_fn": "gelu"}, "act_fn='gelu'"),
        ("TAESD", {"encoder_block_out_channels": [8, 8, 16, 16]}, "encoder_block_out_channels=.*one and the same"),
        ("TAESD", {"upsampling_scaling_factor": 4}, "upsampling_scaling_factor=4"),
    ],
)
def test_other_architectures_are_refused(make, family, change, message):
    config = json.loads((make(family).folder / "config.json").read_text()) | change
    with pytest.raises(InputError, match=message):
        from_diffusers(config, name="it")


def test_config_json_without_a_field_and_back(pair):
    config = json.loads((pair.folder / "config.json").read_text())
    assert from_diffusers(to_diffusers(pair.ours.config), name=pair.ours.config.name) == pair.ours.config
    del config["latent_channels"]
    with pytest.raises(InputError, match="config.json has no field latent_channels; is it an A"):
        from_diffusers(config, name="it")
    with pytest.raises(InputError, match="differ in size"):
        to_diffusers(AutoencoderConfig.tiny(decoder_resnets=3))


def test_published_sizes():
    """Decoder of SD 1.x / SDXL: 49.5 million parameters (with the 1x1 convolution before it); TAESD: 1.2 million."""

    def sizes(config):
        shapes = jax.eval_shape(lambda: autoencoders.init(config, jax.random.key(0))).params
        return [sum(x.size for x in jax.tree.leaves(shapes[side])) for side in ("encoder", "decoder")]

    assert sizes(AutoencoderConfig()) == [34_163_664, 49_490_199]
    assert sizes(TinyAutoencoderConfig()) == [1_222_532, 1_222_531]
