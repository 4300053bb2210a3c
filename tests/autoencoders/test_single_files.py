"""Autoencoders without a config.json, in the names of the original LDM code and others, and statistics of latents."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.numpy import load_file, save_file

from lpl_jax import autoencoders
from lpl_jax.autoencoders import AutoencoderConfig
from lpl_jax.autoencoders.diffusers_config import to_diffusers
from lpl_jax.data import LatentStore, write_store
from lpl_jax.data.folders import FolderSource
from lpl_jax.data.inspect import statistics
from lpl_jax.data.store import check_autoencoder
from lpl_jax.errors import InputError
from lpl_jax.io.fingerprints import fingerprint

# Levels and blocks that differ, so that no two tensors could be taken for each other.
CONFIG = AutoencoderConfig(
    encoder_channels=(32, 64, 96), decoder_channels=(32, 64, 96), encoder_resnets=1, decoder_resnets=2
)
MEAN, STD = (0.5, -0.25, 1.0, 0.0), (2.0, 0.5, 1.25, 1.0)


def random(config):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: autoencoders.init(config, jax.random.key(0)))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def original_name(name):
    """What the LDM code calls a tensor of an autoencoder with three levels."""
    words = name.split(".")
    for index, word in enumerate(words):
        if word == "up_blocks":
            words[index : index + 2] = ["up", str(2 - int(words[index + 1]))]
        elif word == "mid_block":
            kind, number = words[index + 1 : index + 3]
            words[index : index + 3] = ["mid", f"block_{int(number) + 1}" if kind == "resnets" else "attn_1"]
    if words[-2] == "0" and words[-3] == "to_out":
        words[-3:-1] = ["proj_out"]
    new = {"down_blocks": "down", "resnets": "block", "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"}
    new |= {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}
    name = ".".join(new.get(word, word) for word in words)
    return name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")


def original(tensors):
    """Names of the LDM code, whose attention is made of 1x1 convolutions."""
    renamed = {original_name(name): tensor for name, tensor in tensors.items()}
    return {
        name: tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
        for name, tensor in renamed.items()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(autoencoder, its tensors under diffusers' names)."""
    folder, ours = tmp_path_factory.mktemp("plain") / "it", random(CONFIG)
    autoencoders.save(ours, folder)
    return ours, load_file(folder / "diffusion_pytorch_model.safetensors")


def same(loaded, ours):
    assert fingerprint(loaded.params) == fingerprint(ours.params)
    fields = {name: value for name, value in vars(loaded.config).items() if name != "name"}
    assert fields == {name: value for name, value in vars(ours.config).items() if name != "name"}


def test_names_are_those_of_the_original_code(made):
    names = set(original(made[1]))
    assert {"decoder.up.2.block.0.conv1.weight", "decoder.up.2.upsample.conv.bias", "decoder.up.0.block.1.norm2.bias",
            "encoder.down.0.downsample.conv.weight", "encoder.mid.attn_1.proj_out.weight",
            "encoder.mid.attn_1.norm.bias",
            "decoder.mid.block_2.conv1.bias", "decoder.up.0.block.0.nin_shortcut.weight", "encoder.norm_out.weight",
            "quant_conv.weight", "decoder.conv_out.bias"} <= names  # fmt: skip
    assert not any(part in name for name in names for part in ("blocks", "upsamplers", "to_"))


LAYOUTS = {
    "vae.safetensors": lambda t: t,
    "vae.pt": lambda t: {"state_dict": t, "global_step": 7, "epoch": 1},
    "vae.ckpt": lambda t: t | {f"loss.{key}": np.zeros(3, np.float32) for key in ("logvar", "lin.w")},
    "sd.ckpt": lambda t: {
        "state_dict": {f"first_stage_model.{k}": v for k, v in t.items()}
        | {"model.diffusion_model.out.weight": np.ones(3, np.float32), "betas": np.ones(3, np.float32)}
    },
    "sd.safetensors": lambda t: (
        {f"first_stage_model.{k}": v for k, v in t.items()} | {"cond_stage_model.x.weight": np.ones(3, np.float32)}
    ),
}


def write(path, content):
    def tensor(value):
        return {k: tensor(v) for k, v in value.items()} if isinstance(value, dict) else value

    if path.suffix == ".safetensors":
        save_file({k: np.ascontiguousarray(v) for k, v in content.items()}, path)
    else:

        def to_torch(value):
            if isinstance(value, dict):
                return {key: to_torch(each) for key, each in value.items()}
            return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value

        torch.save(to_torch(content), path)


@pytest.mark.parametrize("file", LAYOUTS)
@pytest.mark.parametrize("names", ["original", "diffusers"])
def test_a_file_without_config_is_the_same_autoencoder(file, names, made, tmp_path, capsys):
    ours, tensors = made
    write(tmp_path / file, LAYOUTS[file](original(tensors) if names == "original" else tensors))
    for source in (tmp_path / file, tmp_path):
        same(autoencoders.load(source), ours)
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "no config.json; latents are scaled as those of Stable Diffusion 1, as diffusers assumes" in said


def test_an_asymmetric_one_and_one_without_extras(tmp_path):
    for name, changes in {
        "wide": dict(decoder_channels=(64, 128, 256, 256), encoder_channels=(32, 32, 64, 64), mask_condition=True),
        "bare": dict(mid_attention=False, quant_conv=False, post_quant_conv=False, latent_channels=3),
    }.items():
        config = AutoencoderConfig(**{"encoder_resnets": 1, "decoder_resnets": 2, **vars(CONFIG), **changes})
        ours = random(config)
        autoencoders.save(ours, tmp_path / name)
        (tmp_path / name / "config.json").unlink()
        same(autoencoders.load(tmp_path / name), ours)


@pytest.mark.parametrize(
    ("sign", "scale"),
    [
        ("conditioner.embedders.1.model.x", dict(scaling_factor=0.13025)),
        ("model.diffusion_model.joint_blocks.0.x", dict(scaling_factor=1.5305, shift_factor=0.0609)),
        ("model.diffusion_model.double_blocks.0.x", dict(scaling_factor=0.3611, shift_factor=0.1159)),
    ],
)
def test_the_model_that_a_checkpoint_is_of_decides_the_scale(sign, scale, made, tmp_path):
    write(tmp_path / "x.safetensors", LAYOUTS["sd.safetensors"](original(made[1])) | {sign: np.ones(2, np.float32)})
    config = autoencoders.load(tmp_path / "x.safetensors").config
    assert {name: getattr(config, name) for name in scale} == scale


def test_statistics_in_a_checkpoint_are_used(made, tmp_path):
    statistics = {"edm_mean": np.float32(MEAN).reshape(1, 4, 1, 1), "edm_std": np.float32(STD).reshape(1, 4, 1, 1)}
    write(tmp_path / "x.safetensors", LAYOUTS["sd.safetensors"](original(made[1])) | statistics)
    config = autoencoders.load(tmp_path / "x.safetensors").config
    assert (config.latents_mean, config.latents_std, config.scaling_factor) == (MEAN, STD, 0.5)


def test_what_tensors_do_not_tell_is_asked_for_and_read_beside_the_file(tmp_path):
    small, sixteen = AutoencoderConfig.tiny(), AutoencoderConfig(**{
        **vars(CONFIG), "latent_channels": 16, "quant_conv": False, "post_quant_conv": False})  # fmt: skip
    for config, words in (
        (small, "32 groups.*do not divide its width 8"),
        (sixteen, "Stable Diffusion 3's and FLUX.1's"),
    ):
        folder, ours = tmp_path / config.name / str(config.latent_channels), random(config)
        autoencoders.save(ours, folder)
        text = (folder / "config.json").read_text()
        (folder / "config.json").unlink()
        (file,) = folder.iterdir()
        with pytest.raises(InputError, match=f"{words}.*put diffusers' config.json beside the file"):
            autoencoders.load(file)
        (folder / "config.json").write_text(text)
        same(autoencoders.load(file), ours)


def test_something_else_is_said_to_be_no_autoencoder(tmp_path):
    write(tmp_path / "x.safetensors", {"weight": np.ones(3, np.float32)})
    with pytest.raises(InputError, match="holds no autoencoder of a known layout"):
        autoencoders.load(tmp_path / "x.safetensors")


# --- statistics of the channels


@pytest.fixture(scope="module")
def with_statistics():
    config = AutoencoderConfig.tiny(
        latents_mean=MEAN, latents_std=STD, encoder_channels=(8, 16), decoder_channels=(8, 16)
    )
    return random(config)


def test_scaling_is_that_of_diffusers_pipelines(with_statistics):
    ours = with_statistics
    raw = np.random.default_rng(1).normal(size=(2, 3, 3, 4)).astype(np.float32)
    mean, std = (torch.tensor(each).view(1, 4, 1, 1) for each in (MEAN, STD))
    z = torch.from_numpy(raw.transpose(0, 3, 1, 2))
    wanted = ((z - mean) * ours.config.scaling_factor / std).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours.scale(raw), wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(ours.unscale(wanted), raw, rtol=1e-5, atol=1e-6)
    plain = ours.replace(config=AutoencoderConfig(**vars(ours.config) | {"latents_mean": None, "latents_std": None}))
    decoded = plain.decode(plain.scale(raw))
    np.testing.assert_allclose(ours.decode(ours.scale(raw)), decoded, rtol=1e-4, atol=1e-4 * np.abs(decoded).max())


def test_they_go_out_and_come_back(with_statistics, tmp_path):
    autoencoders.save(with_statistics, tmp_path)
    theirs = AutoencoderKL.from_pretrained(tmp_path).config
    assert (tuple(theirs.latents_mean), tuple(theirs.latents_std)) == (MEAN, STD)
    same(autoencoders.load(tmp_path), with_statistics)


def test_null_is_none_and_half_is_refused(with_statistics, tmp_path):
    autoencoders.save(with_statistics, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def load(**changes):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        return autoencoders.load(tmp_path).config

    assert load(latents_mean=None, latents_std=None).latents_mean is None
    assert load(latents_mean=[[[x]] for x in MEAN]).latents_mean == MEAN
    with pytest.raises(InputError, match="latents_std=None: both are needed, or none"):
        load(latents_std=None)
    with pytest.raises(InputError, match="latents_mean=.*possible: 4 numbers"):
        load(latents_mean=[0.0, 1.0])
    with pytest.raises(InputError, match="latents_std=.*above 0"):
        load(latents_std=[1.0, 1.0, 0.0, 1.0])
    with pytest.raises(InputError, match="shift_factor=0.5 and latents_mean="):
        load(shift_factor=0.5)
    with pytest.raises(InputError, match="latents_mean='x'"):
        load(latents_mean="x")


def test_a_store_keeps_them(with_statistics, image_folder, tmp_path):
    store = write_store(tmp_path / "store", FolderSource(image_folder, 16), with_statistics, batch_size=8)
    reread = LatentStore(store.path)
    assert (reread.manifest.latents_mean, reread.manifest.latents_std) == (MEAN, STD)
    check_autoencoder(reread, with_statistics)
    other = with_statistics.replace(
        config=AutoencoderConfig(**vars(with_statistics.config) | {"latents_std": (1.0, 1.0, 1.0, 1.0)})
    )
    with pytest.raises(InputError, match="latents_std"):
        check_autoencoder(reread, other)
    means = np.stack([reread[i].mean[0] for i in range(len(reread))])
    wanted = np.mean(np.asarray(with_statistics.scale(means)), axis=(0, 1, 2))
    np.testing.assert_allclose(statistics(reread)["latent_mean"], wanted, rtol=1e-4, atol=1e-5)
    assert to_diffusers(with_statistics.config)["latents_mean"] == list(MEAN)


def test_a_store_is_encoded_in_float32_whatever_the_decoder_computes_in(with_statistics, image_folder, tmp_path):
    source = FolderSource(image_folder, 16)
    stores = [
        write_store(tmp_path / dtype, source, with_statistics.with_dtype(dtype), batch_size=8)
        for dtype in ("float32", "bfloat16")
    ]
    for record, low in zip(*stores, strict=True):
        np.testing.assert_array_equal(record.mean, low.mean)
