"""Frozen networks by their published architecture, so that counting and compiling fetch nothing."""

import dataclasses
import functools

import jax

from lpl_jax import autoencoders
from lpl_jax.autoencoders import Autoencoder, AutoencoderConfig
from lpl_jax.experiment import Experiment
from lpl_jax.io.hub import hub_id
from lpl_jax.text import TextConditioner, TextConfig, abstract_conditioner, load_conditioner

_asymmetric = functools.partial(AutoencoderConfig, mask_condition=True)
# By hub id.
AUTOENCODERS = {
    "stabilityai/sdxl-vae": AutoencoderConfig(scaling_factor=0.13025),
    "stabilityai/sd-vae-ft-mse": AutoencoderConfig(),
    "stabilityai/sd-vae-ft-ema": AutoencoderConfig(),
    "cross-attention/asymmetric-autoencoder-kl-x-1-5": _asymmetric(
        decoder_channels=(192, 384, 768, 768), decoder_resnets=4
    ),
    "cross-attention/asymmetric-autoencoder-kl-x-2": _asymmetric(
        decoder_channels=(256, 512, 1024, 1024), decoder_resnets=6
    ),
}
TOWERS = {
    "openai/clip-vit-large-patch14": TextConfig(768, layers=12, heads=12, mlp_width=3072),
    "openai/clip-vit-base-patch32": TextConfig(512, layers=12, heads=8, mlp_width=2048),
}


def open_autoencoder(experiment: Experiment) -> tuple[Autoencoder, str]:
    """The autoencoder and a line on where it is from: with shapes in place of weights if its architecture is known."""
    source = experiment.autoencoder
    found = hub_id(source.source)
    if found and found.repository in AUTOENCODERS:
        config = dataclasses.replace(AUTOENCODERS[found.repository], name=source.source, dtype=source.dtype)
        shapes = jax.eval_shape(functools.partial(autoencoders.init, config), jax.random.key(0))
        return shapes, f"{source.source}: the published architecture; nothing fetched, random weights where run"
    return autoencoders.load(**dataclasses.asdict(source)), f"{source.source}: loaded"


def open_text(experiment: Experiment) -> TextConditioner | None:
    """The text tower of a run on text: with shapes in place of weights if its architecture is known."""
    source = experiment.text
    if source is None:
        return None
    found = hub_id(source.source)
    if found and found.repository in TOWERS and source.subfolder is None:
        return abstract_conditioner(source, TOWERS[found.repository])
    return load_conditioner(source)[0]
