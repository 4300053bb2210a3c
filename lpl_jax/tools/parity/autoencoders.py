"""Autoencoders against diffusers: moments, feature taps, images, inpainting, gradients, bfloat16, and folders."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderTiny

from lpl_jax import autoencoders
from lpl_jax.autoencoders.diffusers_config import to_diffusers
from lpl_jax.autoencoders.files import find
from lpl_jax.autoencoders.weights import read_tensors
from lpl_jax.io.weight_files import open_weights
from lpl_jax.tools.parity.comparison import (
    BFLOAT16,
    FORWARD,
    GRADIENT,
    Comparison,
    Group,
    Settings,
    close,
    equal_by_name,
)
from lpl_jax.tools.parity.torch_side import Model, arrays, cast, nchw, nhwc, randomize


def _blocks(levels: int) -> dict[str, Any]:
    return dict(down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)


_BLOCKS = _blocks(4)
_TINY_KL = dict(**_BLOCKS, block_out_channels=(8, 16, 16, 24), layers_per_block=1, norm_num_groups=4)
_FULL_KL = dict(**_BLOCKS, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
_FULL_ASYMMETRIC = dict(**_BLOCKS, down_block_out_channels=(128, 256, 512, 512), layers_per_down_block=2)
_FLUX = dict(
    latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
)
# The families at widths for a quick comparison.
FAMILIES = {
    "SD": (AutoencoderKL, dict(**_TINY_KL, latent_channels=4, scaling_factor=0.13025)),
    "SD3 and FLUX.1": (AutoencoderKL, _TINY_KL | _FLUX),
    "asymmetric": (
        AsymmetricAutoencoderKL,
        dict(
            **_BLOCKS,
            down_block_out_channels=(8, 8, 16, 16),
            up_block_out_channels=(8, 16, 24, 24),
            layers_per_down_block=1,
            layers_per_up_block=0,
            norm_num_groups=4,
        ),
    ),
    "TAESD": (
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
}
# Factors 4 and 16: other numbers of taps. `loss` compares them.
LEVELS = {
    f"KL of {name} levels": (
        AutoencoderKL,
        dict(**_blocks(len(widths)), block_out_channels=widths, layers_per_block=1, norm_num_groups=4, **latents),
    )
    for name, widths, latents in (
        ("three", (8, 16, 24), dict(latent_channels=3)),
        ("five", (8, 8, 16, 16, 24), dict(latent_channels=6, use_quant_conv=False, use_post_quant_conv=False)),
    )
}
# And at the widths of published weights.
PUBLISHED = {
    "SD, published widths": (AutoencoderKL, dict(**_FULL_KL, latent_channels=4)),
    "SD3 and FLUX.1, published widths": (AutoencoderKL, _FULL_KL | _FLUX),
    "asymmetric x1.5": (
        AsymmetricAutoencoderKL,
        dict(**_FULL_ASYMMETRIC, up_block_out_channels=(192, 384, 768, 768), layers_per_up_block=3),
    ),
    "asymmetric x2": (
        AsymmetricAutoencoderKL,
        dict(**_FULL_ASYMMETRIC, up_block_out_channels=(256, 512, 1024, 1024), layers_per_up_block=5),
    ),
    "TAESD, published widths": (AutoencoderTiny, dict()),
}
RELU_GRADIENT = 0.05


def groups(settings: Settings) -> list[Group]:
    """What is compared: the model that was given, else a tiny one of each family."""
    if settings.autoencoder:
        path, ours = find(settings.autoencoder, None), autoencoders.load(settings.autoencoder)
        model = load_torch(path, ours.config)
        return [Group(ours.config.name, partial(compare, model, ours, path, settings))]
    return [Group(f"{family} (tiny, random)", partial(_tiny, family, settings)) for family in FAMILIES]


def _tiny(family: str, settings: Settings) -> Iterator[Comparison]:
    folder = settings.scratch / "autoencoders" / family
    model = random_torch(family, folder, settings.seed)
    yield from compare(model, autoencoders.load(folder), folder, settings)


def random_torch(family: str, folder: Path, seed: int = 0) -> Model:
    """diffusers' model of a family with random weights, which are saved in `folder`."""
    kind, options = (FAMILIES | LEVELS | PUBLISHED)[family]
    model = randomize(kind(**options), seed)
    model.save_pretrained(folder)
    return model


def compare(model: Model, ours: autoencoders.Autoencoder, folder: Path, settings: Settings) -> Iterator[Comparison]:
    """All rows of one autoencoder: diffusers' model and ours of the same folder."""
    inputs = example(ours.config, settings)
    theirs, found = torch_outputs(model, ours.config, **inputs), outputs(ours, **inputs)
    yield close("encoder mean", found["mean"], theirs["mean"], FORWARD)
    if "logvar" in theirs:
        yield close("encoder log-variance", found["logvar"], theirs["logvar"], FORWARD)
    for name, mine, reference in zip(ours.config.tap_names, found["taps"], theirs["taps"], strict=True):
        yield close(f"tap {name}", mine, reference, FORWARD)
    for name in ("taps without post_quant_conv", "decoded image", "image decoded with image and mask"):
        if name in theirs:
            yield close(name, found[name], theirs[name], FORWARD)
    yield close("gradient of the taps", found["gradient"], theirs["gradient"], gradient_tolerance(model, settings))

    yield from _bfloat16(model, ours.config, folder, inputs, theirs)
    yield _written(model, ours, settings)


def gradient_tolerance(model: Model, settings: Settings) -> float:
    """Of gradients with respect to latents: wider for the weights of a TAESD type that a user gives.

    These have ReLUs. Where rounding carries the input of one across 0, the gradient of the latents around it jumps, in
    PyTorch as here; with trained weights 1.2e-2 has been seen between float32 and float64, at a mean of 1.4e-4.
    """
    return RELU_GRADIENT if settings.autoencoder and isinstance(model, AutoencoderTiny) else GRADIENT


def _bfloat16(model, config, folder: Path, inputs: dict, theirs: dict) -> Iterator[Comparison]:
    """Ours in bfloat16 against PyTorch in float32, within a fixed bound, or thrice what PyTorch loses in bfloat16.

    How much is lost depends on the weights: with features of very different sizes both lose more than the bound.
    """
    ours = outputs(autoencoders.load(folder, dtype=jnp.bfloat16), **inputs, gradient=False)
    lowered = torch_outputs(cast(model, torch.bfloat16), config, **inputs, gradient=False)
    for name, key in (("encoder mean", "mean"), ("taps", "taps"), ("decoded image", "decoded image")):
        usual = close(key, lowered[key], theirs[key], BFLOAT16).max_error
        yield close(f"{name} in bfloat16", ours[key], theirs[key], max(BFLOAT16, 3 * usual))


def _written(model, ours, settings: Settings) -> Comparison:
    """What we write, read by diffusers again."""
    folder = settings.scratch / "written" / model.__class__.__name__ / str(ours.config.latent_channels)
    autoencoders.save(ours, folder)
    again = load_torch(folder, ours.config)
    return equal_by_name(
        "tensors written by us, read by diffusers", arrays(again.state_dict()), arrays(model.state_dict())
    )


def example(config, settings: Settings) -> dict[str, Any]:
    """Images, masks and latents for an autoencoder, two of each."""
    rng = np.random.default_rng(settings.seed)
    sides, small = settings.sides(1), settings.sides(config.downsample)
    return dict(
        images=rng.uniform(-1, 1, (2, *sides, 3)).astype(np.float32),
        mask=(rng.uniform(size=(2, *sides, 1)) < 0.5).astype(np.float32),
        latents=rng.standard_normal((2, *small, config.latent_channels)).astype(np.float32),
    )


@partial(jax.jit, static_argnames=("gradient", "remat"))
def outputs(autoencoder, images, mask, latents, gradient: bool = True, remat: bool = False) -> dict:
    """All that an autoencoder of ours gives, by name; `gradient` is that of the taps' mean squares."""
    config = autoencoder.config
    out = {"decoded image": autoencoder.decode(latents), **autoencoder.encode(images)._asdict()}
    if getattr(config, "post_quant_conv", False):
        out["taps without post_quant_conv"] = list(autoencoder.features(latents, post_quant_conv=False))
    if getattr(config, "mask_condition", False):
        out["image decoded with image and mask"] = autoencoder.decode(latents, image=images, mask=mask)

    def scalar(z):
        taps = list(autoencoder.features(z, remat=remat))
        return sum(jnp.mean(tap**2) for tap in taps), taps

    if not gradient:
        return out | {"taps": scalar(latents)[1]}
    out["gradient"], out["taps"] = jax.grad(scalar, has_aux=True)(latents)
    return out


def torch_outputs(model: Model, config, images, mask, latents, gradient: bool = True) -> dict:
    """The same of diffusers' model; TAESD has no log-variance."""
    dtype = next(model.parameters()).dtype
    images, mask, z = nchw(images).to(dtype), nchw(mask).to(dtype), nchw(latents).requires_grad_(gradient)
    raw = unscaled(config, z).to(dtype)
    taps = torch_taps(model, raw)
    out: dict[str, Any] = {"taps": taps}
    if gradient:
        (out["gradient"],) = torch.autograd.grad(torch.stack([(tap**2).mean() for tap in taps]).sum(), z)
    with torch.no_grad():
        out["decoded image"], encoded = model.decode(raw).sample, model.encode(images)
        if getattr(config, "mask_condition", False):
            out["image decoded with image and mask"] = model.decode(raw, image=images, mask=mask).sample
        if isinstance(model, AutoencoderTiny):
            out["mean"] = encoded.latents
        else:
            out |= {"mean": encoded.latent_dist.mean, "logvar": encoded.latent_dist.logvar}
        if getattr(config, "post_quant_conv", False):
            out["taps without post_quant_conv"] = torch_taps(model, raw, post_quant_conv=False)
    return {name: list(map(nhwc, each)) if isinstance(each, list) else nhwc(each) for name, each in out.items()}


def unscaled(config, z: torch.Tensor) -> torch.Tensor:
    """Scaled latents (B, C, h, w) -> raw ones, as diffusers' pipelines do before they decode."""
    if config.latents_mean is None:
        return z / config.scaling_factor + config.shift_factor
    mean, std = (
        torch.tensor(each, dtype=z.dtype).view(1, -1, 1, 1) for each in (config.latents_mean, config.latents_std)
    )
    return z * std / config.scaling_factor + mean


def torch_taps(model: Model, raw: torch.Tensor, post_quant_conv: bool = True) -> list[torch.Tensor]:
    """The decoder features of a diffusers autoencoder for unscaled latents, collected by hooks."""
    decoder = model.decoder
    if isinstance(model, AutoencoderTiny):
        # the last block of each level: what comes before an upsampler, or before the last convolution
        layers = list(decoder.layers)
        ends = [i for i, layer in enumerate(layers) if isinstance(layer, torch.nn.Upsample)] + [len(layers) - 1]
        tapped = [layers[end - 1] for end in ends]
    else:
        tapped = (decoder.mid_block, *decoder.up_blocks)
    taps = []
    hooks = [block.register_forward_hook(lambda _module, _inputs, out: taps.append(out)) for block in tapped]
    if post_quant_conv and getattr(model, "post_quant_conv", None) is not None:
        raw = model.post_quant_conv(raw)
    decoder(raw)
    for hook in hooks:
        hook.remove()
    return taps


def load_torch(path: Path, config) -> Model:
    """diffusers' model of a folder or file, in float32.

    What is not in the form that diffusers writes (TAESD's .pth files, folders with the norm branch of FLUX.2's TAESD,
    single files, other names) is not what `from_pretrained` reads: there a model of our configuration takes the
    tensors that we read, with the branch put in from `NormedBlock`.
    """
    fields = to_diffusers(config)
    kind = fields.pop("_class_name")
    cls = {cls.__name__: cls for cls in (AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderTiny)}.get(kind)
    tensors = read_tensors(path)
    if cls is not None and path.is_dir() and (path / "config.json").is_file():
        options = dict(torch_dtype=torch.float32, low_cpu_mem_usage=False)
        half_only = not any(path.glob("diffusion_pytorch_model.[sb]*")) and any(path.glob("*.fp16*"))
        with contextlib.suppress(OSError, ValueError):
            model = cls.from_pretrained(path, variant="fp16" if half_only else None, **options)
            if set(open_weights(path).tensors) == set(model.state_dict()):
                return model.eval().requires_grad_(False)
    model = (cls or AutoencoderTiny)(**fields)
    if cls is not None:
        model.load_state_dict({name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()})
        return model.eval().requires_grad_(False)
    for side in ("encoder", "decoder"):
        layers = getattr(model, side).layers
        for number in range(len(layers)):
            if f"{side}.layers.{number}.pool.0.weight" in tensors:
                layers[number] = NormedBlock(layers[number], tensors[f"{side}.layers.{number}.pool.0.weight"].shape[1])
    model.load_state_dict({name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()})
    return model.eval().requires_grad_(False)


def save_taesd_pair(model: Model, folder: Path, name: str) -> None:
    """An AutoencoderTiny in the layout that TAESD is published in: NAME_encoder.pth and NAME_decoder.pth.

    The decoder's numbers count the clamp of the latents as a layer, its first.
    """
    for side, first in (("encoder", 0), ("decoder", 1)):
        named = ((*key.partition("."), tensor) for key, tensor in getattr(model, side).layers.state_dict().items())
        state = {f"{int(number) + first}.{rest}": tensor for number, _, rest, tensor in named}
        torch.save(state, folder / f"{name}_{side}.pth")


class NormedBlock(torch.nn.Module):
    """A block of AutoencoderTiny after a residual branch with a GroupNorm, which diffusers does not have."""

    def __init__(self, block: Model, width: int):
        super().__init__()
        self.conv, self.fuse = block.conv, block.fuse
        self.pool = torch.nn.Sequential(
            torch.nn.Conv2d(width, 4 * width, 1, bias=False),
            torch.nn.GroupNorm(4, 4 * width),
            torch.nn.ReLU(),
            torch.nn.Conv2d(4 * width, width, 1, bias=False),
        )

    def forward(self, x):
        """(B, C, h, w) -> the same shape."""
        x = x + self.pool(x)
        return self.fuse(self.conv(x) + x)
