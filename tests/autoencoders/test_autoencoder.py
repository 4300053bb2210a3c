"""The Flax autoencoder against diffusers' on the same weights, and the behaviour that users see."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test talks to the hub

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from lpl_jax import autoencoders
from lpl_jax.autoencoders import AutoencoderConfig
from lpl_jax.errors import InputError

TINY = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(8, 16, 16, 24),
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=32,
)
VARIANTS = {
    "sd": dict(latent_channels=4, scaling_factor=0.13025),
    "sd3": dict(
        latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
    ),
}


def torch_model(seed=0, **changes):
    """A diffusers autoencoder whose norms are not the identity, so that a swapped scale and bias would show."""
    torch.manual_seed(seed)
    model = AutoencoderKL(**{**TINY, **changes}).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
    return model


def torch_taps(model, raw, post_quant_conv=True):
    taps = []
    decoder = model.decoder
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: taps.append(out))
        for block in (decoder.mid_block, *decoder.up_blocks)
    ]
    if post_quant_conv and model.post_quant_conv is not None:
        raw = model.post_quant_conv(raw)
    decoder(raw)
    for hook in hooks:
        hook.remove()
    return taps


def nchw(array):
    return torch.from_numpy(np.array(array).transpose(0, 3, 1, 2))


def nhwc(tensor):
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def relative_error(ours, theirs):
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)))


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def pair(request, tmp_path_factory):
    model = torch_model(**VARIANTS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, autoencoders.load(folder), folder


def test_encoder_equals_diffusers(pair):
    model, ours, _ = pair
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)
    moments = jax.jit(lambda a, x: a.encode(x))(ours, images)
    with torch.no_grad():
        theirs = model.encode(nchw(images)).latent_dist
    # float32 sums of a few hundred terms through ~20 layers: 1e-4 is an order above what is seen
    assert relative_error(moments.mean, nhwc(theirs.mean)) < 1e-4
    assert relative_error(moments.logvar, nhwc(theirs.logvar)) < 1e-4


@pytest.mark.parametrize("post_quant_conv", [True, False])
def test_taps_and_images_equal_diffusers(pair, post_quant_conv):
    model, ours, _ = pair
    config = ours.config
    latents = np.random.default_rng(1).normal(size=(2, 4, 6, config.latent_channels)).astype(np.float32)
    raw = nchw(latents / config.scaling_factor + config.shift_factor)
    theirs = torch_taps(model, raw, post_quant_conv)
    taps = jax.jit(lambda a, z: a.features(z, post_quant_conv=post_quant_conv))(ours, latents)
    assert [tap.shape[1:3] for tap in taps] == [(4, 6), (8, 12), (16, 24), (32, 48), (32, 48)]
    for mine, reference in zip(taps, theirs, strict=True):
        assert relative_error(mine, nhwc(reference)) < 1e-4
    if post_quant_conv:
        with torch.no_grad():
            assert (
                relative_error(jax.jit(lambda a, z: a.decode(z))(ours, latents), nhwc(model.decode(raw).sample)) < 1e-4
            )


@pytest.mark.parametrize("remat", [False, True])
def test_gradient_of_taps_equals_diffusers(pair, remat):
    model, ours, _ = pair
    latents = np.random.default_rng(2).normal(size=(1, 4, 4, ours.config.latent_channels)).astype(np.float32)

    def scalar(z):
        return sum(jnp.mean(jnp.square(tap)) for tap in ours.features(z, remat=remat))

    z = nchw(latents).requires_grad_(True)
    sum(
        t.square().mean() for t in torch_taps(model, z / ours.config.scaling_factor + ours.config.shift_factor)
    ).backward()
    assert relative_error(jax.jit(jax.grad(scalar))(latents), nhwc(z.grad)) < 1e-3


def test_fewer_taps_are_a_prefix(pair):
    _, ours, _ = pair
    latents = np.random.default_rng(3).normal(size=(1, 4, 4, ours.config.latent_channels)).astype(np.float32)
    every = ours.features(latents)
    for count in (1, 3):
        for some, tap in zip(ours.features(latents, num_taps=count), every[:count], strict=True):
            np.testing.assert_array_equal(some, tap)
    with pytest.raises(InputError, match="num_taps=6.*1 to 5"):
        ours.features(latents, num_taps=6)


def test_scale_and_unscale_are_inverse(pair):
    _, ours, _ = pair
    raw = np.random.default_rng(4).normal(size=(1, 2, 2, ours.config.latent_channels)).astype(np.float32)
    scaled = ours.scale(raw)
    np.testing.assert_allclose(scaled, (raw - ours.config.shift_factor) * ours.config.scaling_factor, rtol=1e-6)
    np.testing.assert_allclose(ours.unscale(scaled), raw, rtol=1e-5, atol=1e-6)


def test_saved_folder_is_read_by_diffusers_and_by_us_exactly(pair, tmp_path):
    model, ours, _ = pair
    autoencoders.save(ours, tmp_path / "copy")
    again = AutoencoderKL.from_pretrained(tmp_path / "copy")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    assert autoencoders.weights_hash(autoencoders.load(tmp_path / "copy")) == autoencoders.weights_hash(ours)
    with pytest.raises(InputError, match="exists"):
        autoencoders.save(ours, tmp_path / "copy")


def test_old_attention_names_and_fp16_files_load(tmp_path):
    from safetensors.torch import load_file, save_file

    torch_model(**VARIANTS["sd"]).half().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {}
    for name, tensor in load_file(path).items():
        for modern, ancient in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(modern, ancient)
        old[name] = tensor
    expected = autoencoders.weights_hash(autoencoders.load(tmp_path))
    path.unlink()
    save_file(old, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert autoencoders.weights_hash(autoencoders.load(tmp_path)) == expected


def test_bfloat16_is_close(pair):
    _, ours, folder = pair
    low = autoencoders.load(folder, dtype=jnp.bfloat16)
    assert low.params["decoder"]["conv_in"]["kernel"].dtype == jnp.bfloat16
    latents = np.random.default_rng(5).normal(size=(1, 4, 4, ours.config.latent_channels)).astype(np.float32)
    for exact, tap in zip(ours.features(latents), low.features(latents), strict=True):
        assert tap.dtype == jnp.bfloat16
        # 8 bits of mantissa, error growing with the square root of about 30 layers
        assert relative_error(tap.astype(jnp.float32), np.asarray(exact)) < 0.05


def test_weights_are_arguments_not_constants(pair):
    _, ours, _ = pair
    latents = jnp.zeros((1, 4, 4, ours.config.latent_channels))
    text = jax.jit(lambda a, z: a.decode(z)).lower(ours, latents).as_text()
    leaves = len(jax.tree.leaves(ours.params["decoder"]))
    assert text.split("\n")[1].count("%arg") >= leaves  # every weight is an argument of main


def test_hash_sees_every_weight(pair):
    _, ours, _ = pair
    changed = jax.tree.map(lambda x: x, ours.params)
    changed["decoder"]["conv_out"]["bias"] = changed["decoder"]["conv_out"]["bias"].at[0].add(1e-6)
    assert autoencoders.weights_hash(ours) != autoencoders.weights_hash(ours.replace(params=changed))


def test_misfits_are_all_named(pair, tmp_path):
    from safetensors.numpy import load_file, save_file

    _, _, folder = pair
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    del tensors["decoder.conv_in.bias"]
    tensors["decoder.extra.weight"] = np.zeros(3, np.float32)
    tensors["encoder.conv_in.weight"] = np.zeros((8, 3, 5, 5), np.float32)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(InputError) as caught:
        autoencoders.load(tmp_path)
    message = str(caught.value)
    assert "missing decoder/conv_in/bias" in message
    assert "surplus decoder.extra.weight" in message
    assert "encoder.conv_in.weight has shape (8, 3, 5, 5), encoder/conv_in/kernel needs (3, 3, 3, 8)" in message
    assert "\n" not in message


def test_damaged_or_missing_files_are_one_clear_line(pair, tmp_path):
    _, _, folder = pair
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(InputError, match="has no diffusion_pytorch_model.safetensors"):
        autoencoders.load(tmp_path)
    whole = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        autoencoders.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        autoencoders.load(tmp_path)


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "a/b/c", "word"])
def test_unknown_source_names_what_is_possible(source):
    with pytest.raises(InputError, match="give 'bundled', an existing folder"):
        autoencoders.load(source)


def test_hub_id_without_network_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'nobody/nothing' is neither a folder nor to be had from the hub"):
        autoencoders.load("nobody/nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "VQModel"}, "VQModel is not supported; possible: AutoencoderKL"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types"),
        ({"latents_mean": [0.0] * 4}, "latents_mean"),
    ],
)
def test_other_architectures_are_refused(pair, tmp_path, change, message):
    _, _, folder = pair
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        autoencoders.load(tmp_path)


def test_subfolder_of_a_pipeline(pair, tmp_path):
    _, ours, folder = pair
    (tmp_path / "vae").symlink_to(folder)
    assert autoencoders.load(tmp_path, subfolder="vae").config.latent_channels == ours.config.latent_channels
    with pytest.raises(InputError, match="try subfolder='vae'"):
        autoencoders.load(tmp_path)


def test_shapes_that_do_not_fit(pair):
    _, ours, _ = pair
    with pytest.raises(InputError, match="30x32 pixels.*divisible by 8"):
        ours.encode(jnp.zeros((1, 30, 32, 3)))
    with pytest.raises(InputError, match="latents with 5 channels"):
        ours.decode(jnp.zeros((1, 4, 4, 5)))


def test_config_refuses_float16_and_bad_widths():
    with pytest.raises(InputError, match="float16 overflows"):
        AutoencoderConfig(dtype="float16")
    with pytest.raises(InputError, match="width 10 is not divisible by norm_groups=4"):
        AutoencoderConfig.tiny(encoder_channels=(10, 16, 16, 16))


def test_published_sizes():
    """Decoder of SD 1.x / SDXL: 49.5 million parameters (with the 1x1 convolution before it)."""
    shapes = jax.eval_shape(lambda: autoencoders.init(AutoencoderConfig(), jax.random.key(0))).params
    assert sum(x.size for x in jax.tree.leaves(shapes["decoder"])) == 49_490_199
    assert sum(x.size for x in jax.tree.leaves(shapes["encoder"])) == 34_163_664
