"""How many floating-point operations a training step takes, from configs alone (arXiv 2411.04873, Tables 7 and 8).

Counted are matrix products, convolutions and attention, two operations for each multiply-add. Norms, activations,
softmax, residual sums, upsampling, and the arithmetic of the perceptual loss and of its outlier masks are not: they
cost memory traffic, hardly operations. A network's `Work` is a number of multiply-adds; a `Convention` says how many
operations its forward and backward passes count as. Everything is per image.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.extend

from lpl_jax.autoencoders import AutoencoderConfig, TinyAutoencoderConfig
from lpl_jax.denoisers import MMDiTConfig
from lpl_jax.denoisers.mmdit import SINUSOID_DIM
from lpl_jax.errors import InputError
from lpl_jax.losses import LPLConfig
from lpl_jax.text import TextConfig


class Work(NamedTuple):
    """Multiply-adds of one forward pass.

    weights: of activations with weights. first: those among them whose input is data, which no gradient goes to.
    attention: queries with keys, and attention weights with values.
    """

    weights: int
    first: int = 0
    attention: int = 0


@dataclass(frozen=True)
class Convention:
    """How operations are counted; `PAPER` and `USUAL` are the two that there are names for.

    attention_backward: cost of the backward pass of attention in units of its forward pass. first_layers: count the
    gradient with respect to data, which nobody computes. encode: images are encoded within the step.
    """

    name: str
    attention_backward: float
    first_layers: bool
    encode: bool

    def forward(self, work: Work) -> float:
        """Operations of a forward pass of this work."""
        return 2 * (work.weights + work.attention)

    def input_backward(self, work: Work) -> float:
        """Backward pass to the input alone, with frozen weights."""
        return 2 * (work.weights + self.attention_backward * work.attention)

    def backward(self, work: Work) -> float:
        """Backward pass to input and weights."""
        not_computed = 0 if self.first_layers else 2 * work.first
        return 2 * (2 * work.weights + self.attention_backward * work.attention) - not_computed


# PyTorch's FlopCounterMode around a step that encodes its images: fused attention computes its logits again in the
# backward pass, which is counted (five products in place of four).
PAPER = Convention("paper", attention_backward=2.5, first_layers=False, encode=True)
# Model FLOPs, as in "model FLOPs utilisation" (Chowdhery et al. 2022, App. B): a backward pass is twice a forward pass,
# nothing that is computed again counts, and latents come from a store.
USUAL = Convention("usual", attention_backward=2.0, first_layers=True, encode=False)
CONVENTIONS = (PAPER, USUAL)


@dataclass(frozen=True)
class StepFlops:
    """Operations of a training step per image, by part; the three decoder parts are those of one decoded image.

    decoded: images that go through the decoder, as a share of the batch. text: the frozen text tower's forward pass.
    """

    encoder: float
    denoiser_forward: float
    denoiser_backward: float
    clean_decode: float
    predicted_decode: float
    predicted_backward: float
    decoded: float
    text: float = 0.0

    @property
    def base(self) -> float:
        """Without the perceptual loss."""
        return self.encoder + self.text + self.denoiser_forward + self.denoiser_backward

    @property
    def perceptual(self) -> float:
        """What the perceptual loss adds."""
        return self.decoded * (self.clean_decode + self.predicted_decode + self.predicted_backward)

    @property
    def total(self) -> float:
        """Of the step."""
        return self.base + self.perceptual


def step_flops(
    convention: Convention,
    model: MMDiTConfig,
    autoencoder: AutoencoderConfig | TinyAutoencoderConfig,
    resolution: int,
    lpl: LPLConfig | None = None,
    *,
    decoded: float = 0.0,
    context_tokens: int = 1,
    tower: TextConfig | None = None,
) -> StepFlops:
    """Operations of a training step per image of `resolution` x `resolution` pixels.

    Args:
      model: its own number of latent channels does not count, the autoencoder's does.
      lpl: which taps are decoded (the decoder stops after the last one); None is all.
      decoded: images that go through the decoder as a share of the batch, 0 to 1.
      context_tokens: 1 for class labels, else the length of a text.
      tower: of a text tower that runs in the step; None: there is none, or its outputs come from a store.

    Raises:
      InputError: a resolution that does not fit, or a share outside 0 to 1.
    """
    if not 0 <= decoded <= 1:
        raise InputError(f"decoded={decoded} is not a share of the batch, 0 to 1")
    side = _latent_side(autoencoder, resolution)
    denoiser = denoiser_work(model, side, autoencoder.latent_channels, context_tokens)
    taps = autoencoder.num_taps if lpl is None or lpl.taps == "all" else lpl.taps
    decoder = decoder_work(autoencoder, resolution, taps, post_quant_conv=lpl is None or lpl.post_quant_conv)
    return StepFlops(
        encoder=convention.forward(encoder_work(autoencoder, resolution)) if convention.encode else 0.0,
        denoiser_forward=convention.forward(denoiser),
        denoiser_backward=convention.backward(denoiser),
        clean_decode=convention.forward(decoder),
        predicted_decode=convention.forward(decoder),
        predicted_backward=convention.input_backward(decoder),
        decoded=decoded,
        text=0.0 if tower is None else convention.forward(text_work(tower, context_tokens)),
    )


def text_work(config: TextConfig, tokens: int) -> Work:
    """Of a text tower, its projection left out; masked attention counts as if it were not."""
    d = config.width
    weights = config.layers * tokens * (4 * d * d + 2 * d * config.mlp_width)
    return Work(weights, attention=config.layers * 2 * tokens * tokens * d)


def denoiser_work(config: MMDiTConfig, side: int, latent_channels: int | None = None, context_tokens: int = 1) -> Work:
    """Of an `MMDiT` on latents of `side` x `side`. Sinusoids, the class table's look-up and biases are free.

    Raises InputError where patches do not tile the latents.
    """
    channels = config.latent_channels if latent_channels is None else latent_channels
    rows, columns = config.grid(side, side)
    n, t, d = rows * columns, context_tokens, config.hidden
    patch = n * config.patch_size**2 * channels * d
    once, first = _embedding_work(config)
    text = t * config.context_dim * d
    blocks = [_block_work(config, n, t, index) for index in range(config.depth)]
    return Work(
        weights=2 * patch + text + once + sum(weights for weights, _ in blocks),
        first=patch + text + first,
        attention=sum(attention for _, attention in blocks),
    )


def _embedding_work(config: MMDiTConfig) -> tuple[int, int]:
    """Multiply-adds with weights that happen once for each image, not for each token; and those of first layers."""
    d = config.hidden
    first = (1 + 2 * config.control) * SINUSOID_DIM * d + config.pooled_dim * d
    second = (1 + 2 * config.control + (config.pooled_dim > 0)) * d * d
    shared = (6 + config.context_modulation_chunks) * d * d if config.modulation == "single" else 0
    head_modulation = 2 * d * d
    return first + second + shared + head_modulation, first


def _block_work(config: MMDiTConfig, n: int, t: int, index: int) -> tuple[int, int]:
    """Multiply-adds of the block at this index: with weights, and of attention."""
    d, mlp = config.hidden, 2 * config.mlp_ratio * config.hidden**2
    dual = index < config.dual_attention
    pre_only = config.context_pre_only and index == config.depth - 1
    weights = n * (4 * d * d + mlp)
    attention = 2 * (n if pre_only else n + t) * (n + t) * d
    if dual:
        weights += n * 4 * d * d
        attention += 2 * n * n * d
    if pre_only:  # the context gives keys and values, and nothing comes back
        weights += t * 2 * d * d
    else:
        weights += t * (4 * d * d + (mlp if config.context_mlp != "none" else 0))
    if config.modulation == "per_block":
        own = config.context_modulation_chunks
        context_chunks = 2 if pre_only and own else own
        weights += ((9 if dual else 6) + context_chunks) * d * d
    return weights, attention


def encoder_work(config: AutoencoderConfig | TinyAutoencoderConfig, resolution: int) -> Work:
    """Of `Autoencoder.encode`."""
    _latent_side(config, resolution)
    if isinstance(config, TinyAutoencoderConfig):
        return _tiny_encoder_work(config, resolution)
    side, channels = resolution, config.encoder_channels[0]
    weights = _conv(side, 3, channels)
    for level, width in enumerate(config.encoder_channels):
        weights += _resnets(side, channels, width, config.encoder_resnets)
        channels = width
        if level < len(config.encoder_channels) - 1:
            side //= 2
            weights += _conv(side, channels, channels)
    middle = _middle_work(config, side, channels)
    moments = 2 * config.latent_channels
    weights += middle.weights + _conv(side, channels, moments)
    weights += _conv(side, moments, moments, size=1) if config.quant_conv else 0
    return Work(weights, _conv(resolution, 3, config.encoder_channels[0]), middle.attention)


def decoder_work(
    config: AutoencoderConfig | TinyAutoencoderConfig,
    resolution: int,
    taps: int | str = "rgb",
    *,
    post_quant_conv: bool = True,
) -> Work:
    """Of `Autoencoder.features` with so many taps, or of `decode` ("rgb"). Raises InputError for too many taps."""
    side = _latent_side(config, resolution)
    if taps != "rgb" and not (isinstance(taps, int) and 1 <= taps <= config.num_taps):
        raise InputError(f"taps={taps!r}: {config.name} has 1 to {config.num_taps}, or 'rgb' for images")
    if isinstance(config, TinyAutoencoderConfig):
        return _tiny_decoder_work(config, side, taps)
    widths = config.decoder_channels[::-1]
    channels = widths[0]
    middle = _middle_work(config, side, channels)
    weights = middle.weights + _conv(side, config.latent_channels, channels)
    if config.post_quant_conv and post_quant_conv:
        weights += _conv(side, config.latent_channels, config.latent_channels, size=1)
    for level, width in enumerate(widths if taps == "rgb" else widths[: taps - 1]):
        weights += _resnets(side, channels, width, config.decoder_resnets)
        channels = width
        if level < len(widths) - 1:
            side *= 2
            weights += _conv(side, channels, channels)
    weights += _conv(side, channels, 3) if taps == "rgb" else 0
    return Work(weights, attention=middle.attention)


def _conv(side: int, inputs: int, outputs: int, size: int = 3) -> int:
    """Multiply-adds of a convolution with a map of `side` x `side` as its output; padding counts as data."""
    return side * side * inputs * outputs * size * size


def _resnets(side: int, inputs: int, width: int, count: int) -> int:
    shortcut = _conv(side, inputs, width, size=1) if inputs != width else 0
    return _conv(side, inputs, width) + (2 * count - 1) * _conv(side, width, width) + shortcut


def _middle_work(config: AutoencoderConfig, side: int, channels: int) -> Work:
    weights = _resnets(side, channels, channels, 2)
    if not config.mid_attention:
        return Work(weights)
    return Work(weights + 4 * side**2 * channels**2, attention=2 * side**4 * channels)


def _tiny_block(side: int, width: int, norm: bool) -> int:
    return 3 * _conv(side, width, width) + (2 * _conv(side, width, 4 * width, size=1) if norm else 0)


def _tiny_encoder_work(config: TinyAutoencoderConfig, resolution: int) -> Work:
    side, width, last = resolution, config.encoder_width, len(config.encoder_blocks) - 1
    first = weights = _conv(side, 3, width)
    for level, blocks in enumerate(config.encoder_blocks):
        if level:
            side //= 2
            weights += _conv(side, width, width)
        weights += blocks * _tiny_block(side, width, config.midblock_norm and level == last)
    return Work(weights + _conv(side, width, config.latent_channels), first)


def _tiny_decoder_work(config: TinyAutoencoderConfig, side: int, taps: int | str) -> Work:
    width = config.decoder_width
    weights = _conv(side, config.latent_channels, width)
    for level, blocks in enumerate(config.decoder_blocks[:taps] if isinstance(taps, int) else config.decoder_blocks):
        if level:
            side *= 2
            weights += _conv(side, width, width)
        weights += blocks * _tiny_block(side, width, config.midblock_norm and level == 0)
    return Work(weights + (_conv(side, width, 3) if taps == "rgb" else 0))


def _latent_side(config: AutoencoderConfig | TinyAutoencoderConfig, resolution: int) -> int:
    side, rest = divmod(resolution, config.downsample)
    if rest or side < 1:
        raise InputError(f"resolution={resolution}: {config.name} takes multiples of {config.downsample}")
    return side


def traced_flops(function, *args, loops: bool = True) -> int:
    """Operations of the matrix products and convolutions in the program that JAX traces, for all of its arguments.

    Unlike the counts above it holds what is computed again (remat) and products that a kernel of no convention would
    need; unlike XLA's own count the bodies of scans are counted as often as they run. Only traced: nothing is compiled.

    args: arrays or ShapeDtypeStructs. loops: False counts each body once, as XLA does. The body of a while loop is
    counted once either way (its length is not known before it runs); of a conditional the dearest branch.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*args), loops=loops)


def jaxpr_flops(closed: jax.extend.core.ClosedJaxpr, *, loops: bool = True, kernels: bool = True) -> int:
    """`traced_flops` of a program that has been traced; kernels: False leaves out what Pallas kernels do."""
    return _jaxpr_flops(closed.jaxpr, loops, kernels)


def _jaxpr_flops(jaxpr, loops: bool, kernels: bool) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, spec = eqn.invars[1].aval, params["dimension_numbers"].rhs_spec
            total += 2 * eqn.outvars[0].aval.size * kernel.size // kernel.shape[spec[0]]
        elif name != "pallas_call" or kernels:
            inner = [_jaxpr_flops(each, loops, kernels) for each in jax.extend.core.jaxprs_in_params(params)]
            if name == "cond":
                inner = [max(inner)]
            repeats = params["length"] if name == "scan" and loops else 1
            if name == "shard_map":  # inside are the shapes of one device
                axes = params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]  # by JAX version
                repeats = math.prod(params["mesh"].shape[axis] for axis in axes)
            elif name == "pallas_call" and loops:  # a program for each place of the grid
                repeats = math.prod(params["grid_mapping"].grid)
            total += sum(inner) * repeats
    return total
