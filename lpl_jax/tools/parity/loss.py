"""The Latent Perceptual Loss against its PyTorch twins: masks, values and gradients, on features and end to end."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from lpl_jax import autoencoders
from lpl_jax.autoencoders.files import find
from lpl_jax.losses import LPLConfig, latent_perceptual_loss, outlier_mask, perceptual_distance
from lpl_jax.tools.parity import twins
from lpl_jax.tools.parity.autoencoders import gradient_tolerance, load_torch, random_torch, torch_taps, unscaled
from lpl_jax.tools.parity.comparison import FORWARD, GRADIENT, Comparison, Group, Settings, close, equal
from lpl_jax.tools.parity.features import feature_pair
from lpl_jax.tools.parity.torch_side import Model, cast, nchw, nhwc

# Autoencoders of other numbers of levels have other taps, weights and masks.
TINY = ("SD", "KL of three levels", "KL of five levels", "TAESD")


def groups(settings: Settings) -> list[Group]:
    """What is compared: the loss end to end, and without a given model also on features."""
    if settings.autoencoder:
        path, ours = find(settings.autoencoder, None), autoencoders.load(settings.autoencoder)
        pair = partial(load_torch, path, ours.config)
        return [Group(f"end to end, {ours.config.name}", partial(_end_to_end, pair, path, settings))]
    return [
        Group("preset reference", partial(_reference, settings)),
        Group("preset paper", partial(_paper, settings)),
        *(Group(f"end to end, {name} (tiny, random)", partial(_tiny_end_to_end, name, settings)) for name in TINY),
    ]


def _reference(settings: Settings) -> Iterator[Comparison]:
    features = feature_pair(settings.seed)
    yield _masks(reference_masks(features[1]))
    for name in twins.REFERENCE_OPTIONS:
        yield from _value_and_gradient(name, *features, *reference_twin(name, *features))


def _paper(settings: Settings) -> Iterator[Comparison]:
    features = feature_pair(settings.seed)
    yield _masks(paper_masks(features[0]))
    for name in twins.PAPER_OPTIONS:
        yield from _value_and_gradient(name, *features, *paper_twin(name, *features))


def reference_twin(name: str, predicted, clean) -> tuple[LPLConfig, np.ndarray, list[np.ndarray]]:
    """An option of the preset `reference`: our config, and value (B,) and gradients (NHWC) of its PyTorch twin."""
    twin_options, options = twins.REFERENCE_OPTIONS[name]
    config = LPLConfig.reference(**options)
    xs = [nchw(maps).requires_grad_() for maps in compared(predicted, config)]
    value = twins.reference_loss(xs, list(map(nchw, compared(clean, config))), **twin_options)
    gradients = torch.autograd.grad(value.sum(), xs)
    return config, value.detach().numpy(), list(map(nhwc, gradients))


def paper_twin(name: str, predicted, clean) -> tuple[LPLConfig, np.ndarray, list[np.ndarray]]:
    """The same of the preset `paper`, whose twin computes in float64."""
    twin_options, options = twins.PAPER_OPTIONS[name]
    ph = [torch.from_numpy(maps.astype(np.float64)).requires_grad_() for maps in predicted]
    phi = [torch.from_numpy(maps.astype(np.float64)) for maps in clean]
    value = twins.paper_loss(ph, phi, **twin_options)
    gradients = torch.autograd.grad(value.sum(), ph)
    return LPLConfig.paper(**options), value.detach().numpy(), [maps.numpy() for maps in gradients]


def value_and_gradient(predicted, clean, config: LPLConfig):
    """Our loss (B,), its gradient with respect to the predicted maps, and what is known of each tap.

    Not jitted: the options share most operations, each of which is compiled once.
    """

    def total(predicted):
        loss, taps = perceptual_distance(config, predicted=predicted, clean=compared(clean, config))
        return jnp.sum(loss), (loss, taps)

    gradient, (loss, taps) = jax.grad(total, has_aux=True)(compared(predicted, config))
    return loss, gradient, taps


def compared(maps, config: LPLConfig):
    """The first of the maps, as many as the config compares."""
    return maps if config.taps == "all" else maps[: config.taps]


def reference_masks(clean) -> list[tuple[np.ndarray, np.ndarray]]:
    """Our masks and the twin's of up_1, up_2 and up_3, True where a pixel is kept."""
    config = LPLConfig.reference()
    return [
        (_mask(clean[tap], tap, config), nhwc(twins.reference_mask(nchw(clean[tap]), down)) > 0)
        for tap, down in ((2, 2), (3, 1), (4, 1))
    ]


def paper_masks(predicted) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same of the preset `paper`, from the predicted maps."""
    config = LPLConfig.paper()
    return [(_mask(predicted[tap], tap, config), _paper_mask(predicted[tap])) for tap in (2, 3, 4)]


def _mask(maps: np.ndarray, tap: int, config: LPLConfig) -> np.ndarray:
    closing, opening = config.kernels(tap, maps.shape[1])
    return np.asarray(outlier_mask(jnp.asarray(maps), closing=closing, opening=opening))


def _paper_mask(maps: np.ndarray) -> np.ndarray:
    planes, kernels = maps.astype(np.float64).transpose(0, 3, 1, 2), twins.paper_kernels(maps.shape[1])
    masks = [[twins.paper_mask(plane, *kernels) for plane in sample] for sample in planes]
    return np.array(masks).transpose(0, 2, 3, 1)


def _masks(pairs: list[tuple[np.ndarray, np.ndarray]]) -> Comparison:
    """Equality of the sets of kept pixels. Raises ValueError where nothing is masked, which would show nothing."""
    ours, theirs = map(list, zip(*pairs, strict=True))
    if all(mask.all() for mask in theirs):
        raise ValueError("no pixel is masked in this example")
    return equal("outlier masks of up_1, up_2, up_3", ours, theirs)


def _value_and_gradient(name, predicted, clean, config, expected, gradient) -> Iterator[Comparison]:
    loss, found, _ = value_and_gradient(predicted, clean, config)
    label = name.replace("_", " ")
    yield close(f"{label}, value", loss, expected, FORWARD)
    yield close(f"{label}, gradient", found, gradient, GRADIENT)


def _tiny_end_to_end(family: str, settings: Settings) -> Iterator[Comparison]:
    folder = settings.scratch / "loss" / family
    model = random_torch(family, folder, settings.seed)
    yield from _end_to_end(lambda: model, folder, settings)


def _end_to_end(load_model, folder: Path, settings: Settings) -> Iterator[Comparison]:
    """Loss of latents through an autoencoder of both frameworks."""
    ours, model = autoencoders.load(folder), load_model()
    pair = latents(ours.config, settings.sides(ours.config.downsample), settings.seed)
    for name in ("reference", "paper"):
        config, expected, gradient = latent_twin(name, model, ours.config, *pair)
        loss, found, _ = latent_value_and_gradient(ours, *pair, config)
        yield close(f"preset {name}, value", loss, expected, FORWARD)
        tolerance = gradient_tolerance(model, settings)
        yield close(f"preset {name}, gradient of the latents", found, gradient, tolerance)


def latents(config, sides: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and clean latents of this height and width; an extreme pixel in each makes outliers in the features."""
    rng = np.random.default_rng(seed)
    shape = 2, *sides, config.latent_channels
    clean = rng.standard_normal(shape)
    clean[:, 1, 2] *= 12
    predicted = clean + 0.3 * rng.standard_normal(shape)
    return predicted.astype(np.float32), clean.astype(np.float32)


def latent_twin(
    preset: str, model: Model, autoencoder_config, predicted, clean
) -> tuple[LPLConfig, np.ndarray, np.ndarray]:
    """A preset through diffusers' autoencoder: our config, and the twin's value (B,) and gradient of the latents.

    The paper's twin has all of it in float64.
    """
    config = LPLConfig.preset(preset)
    net = cast(model, torch.float64 if preset == "paper" else torch.float32)
    z = nchw(predicted).to(net.dtype).requires_grad_()
    features = torch_taps(net, unscaled(autoencoder_config, z), config.post_quant_conv)
    with torch.no_grad():
        target = torch_taps(net, unscaled(autoencoder_config, nchw(clean).to(net.dtype)), config.post_quant_conv)
    if preset == "paper":
        value = twins.paper_loss(*([each.permute(0, 2, 3, 1) for each in maps] for maps in (features, target)))
    else:
        value = twins.reference_loss(features, target)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    return config, value.detach().numpy(), nhwc(gradient)


@partial(jax.jit, static_argnames="config")
def latent_value_and_gradient(autoencoder, predicted, clean, config: LPLConfig):
    """Our loss (B,), its gradient with respect to the predicted latents, and its metrics."""

    def total(predicted):
        loss, metrics = latent_perceptual_loss(autoencoder, config, z0_hat=predicted, z0=clean)
        return jnp.sum(loss), (loss, metrics)

    gradient, (loss, metrics) = jax.grad(total, has_aux=True)(predicted)
    return loss, gradient, metrics
