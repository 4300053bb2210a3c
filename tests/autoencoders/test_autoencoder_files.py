"""Autoencoder files: every format loads, what is saved diffusers reads, and what does not fit is named or refused."""

import dataclasses
import json
import pickle
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from lpl_jax import autoencoders
from lpl_jax.errors import InputError
from lpl_jax.io.fingerprints import fingerprint
from lpl_jax.tools.parity.autoencoders import save_taesd_pair

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def tiny(make):
    """The cheapest family: what its files are like holds for all."""
    return make("TAESD")


@pytest.fixture
def folder(tiny, tmp_path):
    """A folder that has the cheapest family's config.json and no weights yet."""
    shutil.copy(tiny.folder / "config.json", tmp_path)
    return tmp_path


def test_saved_folder_is_read_by_diffusers_and_by_us_exactly(pair, tmp_path):
    autoencoders.save(pair.ours, tmp_path / "copy")
    again = type(pair.model).from_pretrained(tmp_path / "copy")
    assert again.config.scaling_factor == pair.model.config.scaling_factor
    for name, tensor in pair.model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    reread = autoencoders.load(tmp_path / "copy")
    assert fingerprint(reread.params) == fingerprint(pair.ours.params)
    assert reread.config == dataclasses.replace(pair.ours.config, name=reread.config.name)
    with pytest.raises(InputError, match="exists"):
        autoencoders.save(pair.ours, tmp_path / "copy")


def test_old_attention_names_load(sd, tmp_path):
    old = {}
    for name, tensor in load_file(sd.folder / WEIGHTS).items():
        for modern, ancient in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(modern, ancient)
        old[name] = tensor
    assert "encoder.mid_block.attentions.0.query.weight" in old
    save_file(old, tmp_path / WEIGHTS)
    shutil.copy(sd.folder / "config.json", tmp_path)
    assert fingerprint(autoencoders.load(tmp_path).params) == fingerprint(sd.ours.params)
    twice = "encoder.mid_block.attentions.0.to_q.weight"
    save_file(old | {twice: old[twice.replace("to_q", "query")].clone()}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=f"has {twice} twice"):
        autoencoders.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"])
def test_half_precision_files_load_exactly(tiny, folder, dtype, name):
    low = {key: tensor.to(dtype) for key, tensor in tiny.model.state_dict().items()}
    (save_file if name.endswith("safetensors") else torch.save)(low, folder / name)
    ours = autoencoders.load(folder).params["encoder"]["layers_0"]["kernel"]
    theirs = low["encoder.layers.0.weight"].to(torch.float32).numpy().transpose(2, 3, 1, 0)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("safe", [True, False])
def test_folders_in_parts_load(tiny, tmp_path, safe):
    tiny.model.save_pretrained(tmp_path, max_shard_size="20KB", safe_serialization=safe)
    assert len(list(tmp_path.glob("diffusion_pytorch_model-*"))) > 1
    assert fingerprint(autoencoders.load(tmp_path).params) == fingerprint(tiny.ours.params)

    part = sorted(tmp_path.glob("diffusion_pytorch_model-*"))[0]
    part.unlink()
    with pytest.raises(InputError, match=part.name):
        autoencoders.load(tmp_path)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "..", "code.pkl"])
def test_index_that_leaves_the_folder_is_refused(folder, name):
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"encoder.layers.0.weight": name}}))
    with pytest.raises(InputError, match=f"names '{name}'; possible: files of weights beside it"):
        autoencoders.load(folder)


def test_index_without_a_map_is_refused(folder):
    (folder / f"{WEIGHTS}.index.json").write_text("{}")
    with pytest.raises(InputError, match="has no weight_map"):
        autoencoders.load(folder)


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj, protocol=2))])
def test_code_in_a_pickle_is_never_run(folder, write):
    path = folder / "diffusion_pytorch_model.bin"
    write({"encoder.layers.0.weight": Bomb(folder / "run")}, path)
    with pytest.raises(InputError, match="more than tensors; code in it is not run") as caught:
        autoencoders.load(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "run").exists()


def test_bin_that_is_no_state_dict_is_refused(folder):
    torch.save({"step": 3}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="is not a state dict"):
        autoencoders.load(folder)


def test_bin_without_pytorch_says_so(folder, monkeypatch):
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"PK")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match="can only be read with PyTorch: pip install torch"):
        autoencoders.load(folder)


def test_misfits_are_all_named(sd, tmp_path):
    tensors = load_numpy(sd.folder / WEIGHTS)
    del tensors["decoder.conv_in.bias"]
    tensors["decoder.extra.weight"] = np.zeros(3, np.float32)
    tensors["encoder.conv_in.weight"] = np.zeros((8, 3, 5, 5), np.float32)
    tensors["encoder.quant_conv.bias"] = tensors["quant_conv.bias"]
    save_numpy(tensors, tmp_path / WEIGHTS)
    shutil.copy(sd.folder / "config.json", tmp_path)
    with pytest.raises(InputError) as caught:
        autoencoders.load(tmp_path)
    message = str(caught.value)
    assert "missing decoder/conv_in/bias" in message
    assert "surplus decoder.extra.weight" in message
    assert "encoder.conv_in.weight has shape (8, 3, 5, 5), encoder/conv_in/kernel needs (3, 3, 3, 8)" in message
    assert "quant_conv.bias repeats encoder/quant_conv/bias" in message
    assert message.count(";") == 3
    assert "\n" not in message


def test_damaged_or_missing_files_are_one_clear_line(tiny, folder):
    with pytest.raises(InputError, match="has no weights, such as diffusion_pytorch_model.safetensors .*bin"):
        autoencoders.load(folder)
    whole = (tiny.folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        autoencoders.load(folder)
    tensors = load_numpy(tiny.folder / WEIGHTS)
    tensors["decoder.layers.0.bias"][1] = np.nan
    save_numpy(tensors, folder / WEIGHTS)
    with pytest.raises(InputError, match="infinite or undefined values in decoder.layers.0.bias"):
        autoencoders.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        autoencoders.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match="holds a JSON list; an object is needed"):
        autoencoders.load(folder)


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "a/b/c", "word"])
def test_unknown_source_names_what_is_possible(source):
    with pytest.raises(InputError, match="give 'bundled', an existing folder"):
        autoencoders.load(source)


def test_hub_id_without_network_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'nobody/nothing' is neither a folder nor to be had from the hub"):
        autoencoders.load("nobody/nothing")


def test_hub_is_asked_for_pickles_only_where_there_is_nothing_else(tiny, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(hub_id, revision, allow_patterns):
        asked.append(allow_patterns)
        (tmp_path / "vae").mkdir(exist_ok=True)
        shutil.copy(tiny.folder / "config.json", tmp_path / "vae")
        if "vae/diffusion_pytorch_model*.bin" in allow_patterns:
            torch.save(tiny.model.state_dict(), tmp_path / "vae" / "diffusion_pytorch_model.bin")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert fingerprint(autoencoders.load("some/one", subfolder="vae").params) == fingerprint(tiny.ours.params)
    assert len(asked) == 2
    assert not any("bin" in pattern for pattern in asked[0])


def test_subfolder_of_a_pipeline(tiny, tmp_path):
    (tmp_path / "vae").symlink_to(tiny.folder)
    assert autoencoders.load(tmp_path, subfolder="vae").config.latent_channels == 5
    with pytest.raises(InputError, match="try subfolder='vae'"):
        autoencoders.load(tmp_path)


def test_taesd_pth_files_load(tiny, tmp_path):
    save_taesd_pair(tiny.model, tmp_path, "tiny")
    ours = autoencoders.load(tmp_path)
    assert fingerprint(ours.params) == fingerprint(tiny.ours.params)
    assert ours.config.encoder_blocks == (1, 1, 2, 1)
    assert ours.config.decoder_blocks == (2, 1, 1, 1)
    assert (ours.config.latent_channels, ours.config.scaling_factor) == (5, 1.0)
    save_taesd_pair(tiny.model, tmp_path, "other")
    with pytest.raises(InputError, match="has several autoencoders .other_encoder.pth, tiny_encoder.pth"):
        autoencoders.load(tmp_path)


def test_other_pth_files_are_refused(tmp_path):
    for side in ("encoder", "decoder"):
        torch.save({"body.weight": torch.zeros(3)}, tmp_path / f"x_{side}.pth")
    with pytest.raises(InputError, match="holds no autoencoder of a known layout"):
        autoencoders.load(tmp_path)


def torch_layer(state, number, x):
    """Layer `number` of a TAESD sequence with a norm in its middle blocks, from the tensors alone."""
    conv = torch.nn.functional.conv2d

    def get(name):
        return state.get(f"{number}.{name}")

    if get("conv.0.weight") is None:
        return conv(x, get("weight"), get("bias"), padding=1)
    if get("pool.0.weight") is not None:
        h = torch.nn.functional.group_norm(conv(x, get("pool.0.weight")), 4, get("pool.1.weight"), get("pool.1.bias"))
        x = x + conv(h.relu(), get("pool.3.weight"))
    h = x
    for part in (0, 2, 4):
        h = conv(h.relu() if part else h, get(f"conv.{part}.weight"), get(f"conv.{part}.bias"), padding=1)
    return (h + x).relu()


@pytest.mark.shared
def test_real_trained_weights_reconstruct_photos(shared, tmp_path):
    from PIL import Image

    source = shared / "weights" / "taef2"
    ours = autoencoders.load(source)
    assert (ours.config.latent_channels, ours.config.midblock_norm) == (32, True)
    files = sorted((shared / "data" / "imagenette128" / "val").glob("*/*.JPEG"))[::125]
    photos = np.stack([np.asarray(Image.open(path), np.float32) for path in files]) / 127.5 - 1

    @jax.jit
    def reconstruct(a, images):
        latents = a.scale(a.encode(images).mean)
        return latents, a.decode(latents), a.features(latents)

    latents, images, taps = reconstruct(ours, photos)
    mse = np.mean((np.clip(images, -1, 1) - photos) ** 2, axis=(1, 2, 3))
    psnr = 10 * np.log10(4 / mse)
    print("PSNR", psnr)
    assert len(psnr) == 4
    assert psnr.min() > 22  # 24.6, 29.4, 25.6 and 27.9 dB when this was written
    assert 0.8 < np.std(latents) < 0.95
    assert [tap.shape for tap in taps] == [(4, side, side, 64) for side in (16, 32, 64, 128)]

    # the first level of the decoder, with its norms, against PyTorch
    state = torch.load(source / "taef2_decoder.pth", weights_only=True)
    state = {name: tensor.to(torch.float32) for name, tensor in state.items()}
    x = torch.from_numpy(np.array(latents).transpose(0, 3, 1, 2))
    x = torch_layer(state, 1, torch.tanh(x / 3) * 3).relu()
    for number in (3, 4, 5):
        x = torch_layer(state, number, x)
    theirs = x.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(taps[0], theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())

    autoencoders.save(ours, tmp_path)
    again = autoencoders.load(tmp_path)
    assert again.config.midblock_norm
    assert fingerprint(again.params) == fingerprint(ours.params)
