"""Autoencoders of diffusers with random weights: every family at widths for tests, and at the published ones."""

import os
import shutil
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test talks to the hub

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderTiny

from lpl_jax import autoencoders

BLOCKS = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
SMALL = dict(**BLOCKS, block_out_channels=(8, 16, 16, 24), layers_per_block=1, norm_num_groups=4)
PUBLISHED = dict(**BLOCKS, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
ASYMMETRIC = dict(**BLOCKS, down_block_out_channels=(128, 256, 512, 512), layers_per_down_block=2)
FLUX = dict(
    latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
)
FAMILIES = {
    "sd": (AutoencoderKL, dict(**SMALL, latent_channels=4, scaling_factor=0.13025)),
    "flux": (AutoencoderKL, SMALL | FLUX),
    "asymmetric": (
        AsymmetricAutoencoderKL,
        dict(
            **BLOCKS,
            down_block_out_channels=(8, 8, 16, 16),
            up_block_out_channels=(8, 16, 24, 24),
            layers_per_down_block=1,
            layers_per_up_block=0,
            norm_num_groups=4,
        ),
    ),
    "taesd": (
        AutoencoderTiny,
        dict(
            encoder_block_out_channels=(8,) * 4,
            decoder_block_out_channels=(12,) * 4,
            num_encoder_blocks=(1, 1, 2, 1),
            num_decoder_blocks=(2, 1, 1, 1),
            latent_channels=5,
            scaling_factor=0.9,
        ),
    ),
    "sd published": (AutoencoderKL, dict(**PUBLISHED, latent_channels=4)),
    "flux published": (AutoencoderKL, PUBLISHED | FLUX),
    "asymmetric x1.5": (
        AsymmetricAutoencoderKL,
        dict(**ASYMMETRIC, up_block_out_channels=(192, 384, 768, 768), layers_per_up_block=3),
    ),
    "asymmetric x2": (
        AsymmetricAutoencoderKL,
        dict(**ASYMMETRIC, up_block_out_channels=(256, 512, 1024, 1024), layers_per_up_block=5),
    ),
    "taesd published": (AutoencoderTiny, dict()),
}
SMALL_FAMILIES = ("sd", "flux", "asymmetric", "taesd")


class Pair(NamedTuple):
    model: Any  # in PyTorch
    ours: autoencoders.Autoencoder  # the same weights
    folder: Any  # where both came from
    family: str


def torch_model(family, seed=0):
    """A diffusers autoencoder whose norms are not the identity, so that a swapped scale and bias would show."""
    torch.manual_seed(seed)
    cls, config = FAMILIES[family]
    model = cls(**config).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.3, 0.3)
    return model


def make_pair(family, folder):
    model = torch_model(family)
    model.save_pretrained(folder)
    return Pair(model, autoencoders.load(folder), folder, family)


@pytest.fixture(scope="session")
def make(tmp_path_factory):
    """family -> Pair; made once for the widths of tests, anew for the published ones."""
    made, large = {}, []

    def get(family):
        if family in made:
            return made[family]
        pair = make_pair(family, tmp_path_factory.mktemp("family"))
        if family in SMALL_FAMILIES:
            made[family] = pair
        else:
            large.append(pair.folder)
        return pair

    yield get
    for folder in large:  # gigabytes that pytest would keep for three sessions
        shutil.rmtree(folder)


@pytest.fixture(params=SMALL_FAMILIES)
def pair(request, make):
    return make(request.param)


@pytest.fixture
def sd(make):
    return make("sd")
