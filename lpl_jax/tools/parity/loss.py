"""The Latent Perceptual Loss against its PyTorch twins: masks, values and gradients, on features and end to end."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from lpl_jax import autoencoders
from lpl_jax.autoencoders.files import find_folder
from lpl_jax.losses import LPLConfig, latent_perceptual_loss, outlier_mask, perceptual_distance
from lpl_jax.tools.parity import twins
from lpl_jax.tools.parity.autoencoders import gradient_tolerance, load_torch, random_torch, torch_taps
from lpl_jax.tools.parity.comparison import FORWARD, GRADIENT, Comparison, Group, Settings, close, equal
from lpl_jax.tools.parity.torch_side import cast, nchw, nhwc

# Sides and channels of the maps; the latter two are those of a 128 px image.
SIZES, CHANNELS = (16, 32, 64, 128, 128), (4, 3, 3, 2, 2)


def groups(settings: Settings) -> list[Group]:
    if settings.autoencoder:
        folder, ours = find_folder(settings.autoencoder, None), autoencoders.load(settings.autoencoder)
        pair = partial(load_torch, folder, ours.config)
        return [Group(f"end to end, {ours.config.name}", partial(_end_to_end, pair, folder, settings))]
    tiny = partial(_tiny_end_to_end, settings)
    return [
        Group("preset reference", partial(_reference, settings)),
        Group("preset paper", partial(_paper, settings)),
        Group("end to end, SD (tiny, random)", tiny),
    ]


def example(seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Predicted and clean maps (2, H, W, C), correlated, with channels on different scales.

    Outliers of 2 to 6 pixels a side and 12 to 20 deviations lie in one of the two maps or in both, in every other
    channel, so that some channels have none.
    """
    rng = np.random.default_rng(seed)
    predicted, clean = [], []
    for size, channels in zip(SIZES, CHANNELS, strict=True):
        noise = rng.standard_normal((2, 2, size, size, channels))
        maps = np.stack([0.7 * noise[0] + 0.5 * noise[1], noise[0]])  # predicted, clean
        for sample in range(2):
            for channel in range(0, channels, 2):
                for which in ([0], [1], [0, 1]):
                    (row, column), side = rng.integers(0, size, 2), rng.integers(2, 7)
                    height = rng.choice([-1, 1]) * rng.uniform(12, 20)
                    maps[which, sample, row : row + side, column : column + side, channel] += height
        maps = maps * np.exp(0.5 * rng.standard_normal(channels)) + rng.standard_normal(channels)
        for kept, each in zip((predicted, clean), maps.astype(np.float32), strict=True):
            kept.append(each)
    return predicted, clean


def _reference(settings: Settings) -> Iterator[Comparison]:
    features = example(settings.seed)
    config, masks = LPLConfig.reference(), []
    for tap, down in ((2, 2), (3, 1), (4, 1)):
        clean = features[1][tap]
        masks.append((_mask(clean, tap, config), nhwc(twins.reference_mask(nchw(clean), down)) > 0))
    yield _masks(masks)
    for name, (twin_options, options) in twins.REFERENCE_OPTIONS.items():
        config = LPLConfig.reference(**options)
        predicted, clean = (maps[: config.taps] for maps in features)
        xs = [nchw(maps).requires_grad_() for maps in predicted]
        expected = twins.reference_loss(xs, list(map(nchw, clean)), **twin_options)
        expected.sum().backward()
        yield from _value_and_gradient(name, predicted, clean, config, expected, [nhwc(x.grad) for x in xs])


def _paper(settings: Settings) -> Iterator[Comparison]:
    predicted, clean = example(settings.seed)
    config = LPLConfig.paper()
    yield _masks([(_mask(predicted[tap], tap, config), _paper_mask(predicted[tap], SIZES[tap])) for tap in (2, 3, 4)])
    for name, (twin_options, options) in twins.PAPER_OPTIONS.items():
        ph = [torch.from_numpy(maps.astype(np.float64)).requires_grad_() for maps in predicted]
        phi = [torch.from_numpy(maps.astype(np.float64)) for maps in clean]
        expected = twins.paper_loss(ph, phi, **twin_options)
        expected.sum().backward()
        gradient = [maps.grad.numpy() for maps in ph]
        yield from _value_and_gradient(name, predicted, clean, LPLConfig.paper(**options), expected, gradient)


def _mask(maps: np.ndarray, tap: int, config: LPLConfig) -> np.ndarray:
    closing, opening = config.kernels(tap, maps.shape[1])
    return np.asarray(outlier_mask(maps, closing=closing, opening=opening))


def _paper_mask(maps: np.ndarray, size: int) -> np.ndarray:
    planes = maps.astype(np.float64).transpose(0, 3, 1, 2)
    masks = [[twins.paper_mask(plane, *twins.paper_kernels(size)) for plane in sample] for sample in planes]
    return np.array(masks).transpose(0, 2, 3, 1)


def _masks(pairs: list[tuple[np.ndarray, np.ndarray]]) -> Comparison:
    """Equality of the sets of kept pixels. Raises ValueError where nothing is masked, which would show nothing."""
    ours, theirs = map(list, zip(*pairs, strict=True))
    if all(mask.all() for mask in theirs):
        raise ValueError("no pixel is masked in this example")
    return equal("outlier masks of up_1, up_2, up_3", ours, theirs)


def _value_and_gradient(name, predicted, clean, config, expected, gradient) -> Iterator[Comparison]:
    def total(predicted, clean):
        loss, _ = perceptual_distance(config, predicted=predicted, clean=clean)
        return jnp.sum(loss), loss

    # Not jitted: the options share most operations, each of which is compiled once.
    found, loss = jax.grad(total, has_aux=True)(predicted, clean)
    label = name.replace("_", " ")
    yield close(f"{label}, value", loss, expected.detach().numpy(), FORWARD)
    yield close(f"{label}, gradient", found, gradient, GRADIENT)


def _tiny_end_to_end(settings: Settings) -> Iterator[Comparison]:
    folder = settings.scratch / "autoencoders" / "SD"
    model = random_torch("SD", folder, settings.seed)
    yield from _end_to_end(lambda: model, folder, settings)


def _end_to_end(load_model, folder: Path, settings: Settings) -> Iterator[Comparison]:
    """Loss of latents through an autoencoder of both frameworks; the paper's twin with all of it in float64."""
    ours, model = autoencoders.load(folder), load_model()
    predicted, clean = latents = _latents(ours, settings)
    taps, tolerance = min(len(SIZES), ours.config.num_taps), gradient_tolerance(model, settings)

    def unscale(latents, dtype):
        return nchw(latents).to(dtype) / ours.config.scaling_factor + ours.config.shift_factor

    def torch_gradient(loss, z, conv: bool):
        net = cast(model, z.dtype)
        features = torch_taps(net, z, conv)
        with torch.no_grad():
            target = torch_taps(net, unscale(clean, z.dtype), conv)
        value = loss(features, target)
        (gradient,) = torch.autograd.grad(value.sum(), z)
        return value.detach().numpy(), nhwc(gradient) / ours.config.scaling_factor

    def paper(features, target):
        return twins.paper_loss(*([each.permute(0, 2, 3, 1) for each in maps] for maps in (features, target)))

    for name, twin, dtype in (("reference", twins.reference_loss, torch.float32), ("paper", paper, torch.float64)):
        config = LPLConfig.preset(name, taps=taps)
        z = unscale(predicted, dtype).requires_grad_()
        expected, gradient = torch_gradient(twin, z, config.post_quant_conv)
        loss, found = _latent_gradient(ours, *latents, config)
        yield close(f"preset {name}, value", loss, expected, FORWARD)
        yield close(f"preset {name}, gradient of the latents", found, gradient, tolerance)


def _latents(ours: autoencoders.Autoencoder, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and clean latents; an extreme pixel in each makes outliers in the features."""
    rng = np.random.default_rng(settings.seed)
    shape = 2, *settings.sides(ours.config.downsample), ours.config.latent_channels
    clean = rng.standard_normal(shape)
    clean[:, 1, 2] *= 12
    return tuple(each.astype(np.float32) for each in (clean + 0.3 * rng.standard_normal(shape), clean))


@partial(jax.jit, static_argnames="config")
def _latent_gradient(autoencoder, predicted, clean, config):
    def total(predicted):
        loss, _ = latent_perceptual_loss(autoencoder, config, z0_hat=predicted, z0=clean)
        return jnp.sum(loss), loss

    gradient, loss = jax.grad(total, has_aux=True)(predicted)
    return loss, gradient
