"""Analytic counts against the printed tables, PyTorch's own counter, and the programs that JAX traces."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lpl_jax import autoencoders, denoisers
from lpl_jax.autoencoders import AutoencoderConfig, TinyAutoencoderConfig
from lpl_jax.cost import flops
from lpl_jax.cost.flops import PAPER, USUAL, decoder_work, denoiser_work, encoder_work, step_flops
from lpl_jax.denoisers import MMDiT, MMDiTConfig, preset
from lpl_jax.errors import InputError
from lpl_jax.losses import LPLConfig
from lpl_jax.text import TextConfig, TextSource, abstract_conditioner

PAPER_MODEL = preset("paper796", control=True)
SD = AutoencoderConfig()
X15 = AutoencoderConfig(decoder_channels=(192, 384, 768, 768), decoder_resnets=4, mask_condition=True)
# Attention on a CPU, counted by PyTorch's own formulas for the fused kernels of a GPU.
FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def per_iteration(resolution, batch, q=0.0, model=PAPER_MODEL):
    return batch * step_flops(PAPER, model, SD, resolution, decoded=q).total / 1e12


def counted(function):
    """Operations of a call, by PyTorch's counter."""
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        function()
    return counter.get_total_flops()


# --- printed numbers ---


@pytest.mark.parametrize(
    "resolution,batch,printed", [(256, 64, "63.389"), (512, 16, "69.342"), (512, 25, "108.347")], ids=str
)
def test_printed_operations_without_the_loss(resolution, batch, printed):
    # Tables 7 and 8, in every digit and without a free parameter.
    assert f"{per_iteration(resolution, batch):.3f}" == printed


@pytest.mark.parametrize(
    "convention,model,expected",
    [
        (PAPER, dict(control=False), "63.388"),
        (PAPER, dict(pooled_dim=256), "63.389"),  # a third MLP could not be told from two
        (PAPER, dict(hidden=1536), "98.266"),
        (PAPER, dict(context_attn="own"), "63.389"),  # other weights, the same operations
        (PAPER, dict(context_modulation_chunks=0), "63.346"),
        (dataclasses.replace(PAPER, first_layers=True), {}, "63.390"),
        (dataclasses.replace(PAPER, attention_backward=2.0), {}, "63.116"),
        (dataclasses.replace(PAPER, encode=False), {}, "45.935"),
    ],
    ids=str,
)
def test_what_each_ingredient_is_worth(convention, model, expected):
    parts = step_flops(convention, dataclasses.replace(PAPER_MODEL, **model), SD, 256)
    assert f"{64 * parts.base / 1e12:.3f}" == expected


@pytest.mark.parametrize("resolution,batch,q,printed", [(256, 64, 0.30606, "99.987"), (512, 16, 0.30666, "106.581")])
def test_printed_operations_with_the_loss(resolution, batch, q, printed):
    # The share of decoded images is fitted, to five digits: only that the two agree so well says something.
    assert f"{per_iteration(resolution, batch, q):.3f}" == printed
    assert f"{per_iteration(resolution, batch, q + 0.0001):.3f}" != printed


def test_one_share_of_decoded_images_explains_both_sizes():
    # 46.0 % of 1000 timesteps with a clean branch that was not counted, or two thirds of that with it.
    q = 0.46 * 2 / 3
    assert abs(per_iteration(256, 64, q) - 100.064) < 0.005  # CC12M
    assert abs(per_iteration(512, 16, q) - 106.583) < 0.0015  # CC12M
    assert abs(per_iteration(512, 16, q) - 106.581) < 0.0015  # ImageNet
    assert 0.07 < per_iteration(256, 64, q) - 99.987 < 0.08  # ImageNet at 256 px is 0.07 % lower in print


def test_the_asymmetric_decoder_would_need_different_shares():
    heavy, light = (step_flops(PAPER, PAPER_MODEL, each, 512, decoded=1.0) for each in (X15, SD))
    assert heavy.perceptual / light.perceptual == pytest.approx(6758 / 2513, rel=5e-3)
    assert heavy.base == light.base  # its encoder is the ordinary one


# --- PyTorch's counter on small networks ---


@pytest.fixture(scope="module")
def torch_autoencoder():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).requires_grad_(False)


def test_encoder_counts_what_pytorch_counts(torch_autoencoder):
    images = torch.zeros(2, 3, 64, 64)
    found = counted(lambda: torch_autoencoder.encode(images))
    assert found == 2 * PAPER.forward(encoder_work(AutoencoderConfig.tiny(), 64))


@pytest.mark.parametrize("taps", [1, 3, 5, "rgb"])
def test_decoder_counts_what_pytorch_counts(torch_autoencoder, taps):
    def decode(latents):
        decoder = torch_autoencoder.decoder
        if taps == "rgb":
            return torch_autoencoder.decode(latents).sample
        x = decoder.mid_block(decoder.conv_in(torch_autoencoder.post_quant_conv(latents)))
        for block in decoder.up_blocks[: taps - 1]:
            x = block(x)
        return x

    work = decoder_work(AutoencoderConfig.tiny(), 64, taps)
    latents = torch.zeros(2, 4, 8, 8, requires_grad=True)
    assert counted(lambda: decode(latents.detach())) == 2 * PAPER.forward(work)
    both = counted(lambda: decode(latents).sum().backward())  # to the latents: the weights are frozen
    assert both == 2 * (PAPER.forward(work) + PAPER.input_backward(work))


class TorchBlock(nn.Module):
    """The block of paper796 with one context token: shared projections, no MLP for the context."""

    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.image, self.context = nn.Linear(d, 6 * d), nn.Linear(d, 3 * d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.fc1, self.fc2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x, y, c):
        n = x.shape[1]
        image, context = self.image(c)[:, None].chunk(6, -1), self.context(c)[:, None].chunk(3, -1)
        tokens = torch.cat([x * image[1] + image[0], y * context[1] + context[0]], 1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, -1))
        mixed = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + image[2] * mixed[:, :n]
        x = x + image[5] * self.fc2(nn.functional.gelu(self.fc1(x * image[4] + image[3])))
        return x, y + context[2] * mixed[:, n:]


class TorchDenoiser(nn.Module):
    """paper796 with its two control MLPs, as it would be written in PyTorch."""

    def __init__(self, d, heads, depth):
        super().__init__()
        self.patch = nn.Conv2d(4, d, 2, 2)
        self.label = nn.Embedding(11, d)
        self.embed = nn.ModuleList(nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d)) for _ in range(3))
        self.blocks = nn.ModuleList(TorchBlock(d, heads) for _ in range(depth))
        self.modulation, self.head = nn.Linear(d, 2 * d), nn.Linear(d, 16)

    def forward(self, latents, sinusoids, labels):
        x, y = self.patch(latents).flatten(2).transpose(1, 2), self.label(labels)[:, None]
        c = sum(embed(sinusoids) for embed in self.embed)
        for block in self.blocks:
            x, y = block(x, y, c)
        scale, shift = self.modulation(c)[:, None].chunk(2, -1)
        return self.head(x * scale + shift)


def test_denoiser_counts_what_pytorch_counts():
    config = preset("paper796", hidden=32, heads=2, depth=3, control=True)
    network = TorchDenoiser(32, 2, 3)
    inputs = torch.zeros(2, 4, 8, 8), torch.zeros(2, 256), torch.zeros(2, dtype=torch.long)
    work = denoiser_work(config, 8)
    assert counted(lambda: network(*inputs)) == 2 * PAPER.forward(work)
    assert counted(lambda: network(*inputs).sum().backward()) == 2 * (PAPER.forward(work) + PAPER.backward(work))


# --- the programs of this library, as JAX traces them ---

SIZES = {
    "paper796": PAPER_MODEL,
    "literal1536": preset("literal1536"),
    "text": preset("tiny", num_classes=0, context_dim=24, pooled_dim=12, context_pre_only=False),
    "own context": preset("tiny", context_pre_only=False),
    "single": preset("tiny", context_pre_only=False, modulation="single"),
    "shared mlp, patch 1": preset("tiny", context_pre_only=False, context_mlp="shared", patch_size=1),
}
# The jaxpr of a pre-only block also has queries of its context, which nothing uses: the compiler drops them.
PRE_ONLY = {
    "tiny": preset("tiny"),
    "dual": preset("tiny", dual_attention=2),
    "all dual": preset("tiny", dual_attention=3),
    "pre-only, light": preset("tiny", context_mlp="none", context_modulation_chunks=0),
}


def denoiser_inputs(config, side, tokens):
    latents = jax.ShapeDtypeStruct((1, side, side, config.latent_channels), jnp.float32)
    time = jax.ShapeDtypeStruct((1,), jnp.float32)
    text = jax.ShapeDtypeStruct((1, tokens, config.context_dim), jnp.float32)
    context = jax.ShapeDtypeStruct((1,), jnp.int32) if config.num_classes else text
    pooled = jax.ShapeDtypeStruct((1, config.pooled_dim), jnp.float32) if config.pooled_dim else None
    control = jax.ShapeDtypeStruct((1, 4), jnp.float32) if config.control else None
    params = jax.eval_shape(functools.partial(denoisers.init, config), jax.random.key(0))
    return params, latents, time, context, pooled, control


MIXTURES = ("own context", "single", "shared mlp, patch 1", "all dual")  # of what the others have


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in MIXTURES else ()) for n in (*SIZES, *PRE_ONLY)]
)
def test_denoiser_counts_what_is_traced(name):
    config = (SIZES | PRE_ONLY)[name]
    tokens = 7 if config.context_dim else 1
    inputs = denoiser_inputs(config, 16, tokens)

    def forward(params, *rest):
        return MMDiT(config).apply({"params": params}, *rest).sum()

    work = denoiser_work(config, 16, context_tokens=tokens)
    unused = 2 * tokens * config.hidden**2 if name in PRE_ONLY else 0
    assert flops.traced_flops(forward, *inputs) == USUAL.forward(work) + unused
    if not unused:
        # Attention as in the usual convention, gradients of data left out as in the paper's.
        exact = dataclasses.replace(USUAL, first_layers=False)
        assert flops.traced_flops(jax.grad(forward), *inputs) == exact.forward(work) + exact.backward(work)


AUTOENCODERS = {
    "SD": SD,
    "x1.5": X15,
    "no extras": AutoencoderConfig.tiny(mid_attention=False, quant_conv=False, post_quant_conv=False),
    "TAESD": TinyAutoencoderConfig(),
    "TAESD with norm": TinyAutoencoderConfig(midblock_norm=True, encoder_width=16, decoder_width=8),
}


SLOW = ("x1.5", "TAESD with norm")  # the same networks in other sizes


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in AUTOENCODERS])
def test_autoencoder_counts_what_is_traced(name):
    config = AUTOENCODERS[name]
    abstract = jax.eval_shape(functools.partial(autoencoders.init, config), jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    latents = jax.ShapeDtypeStruct((1, 8, 8, config.latent_channels), jnp.float32)
    assert flops.traced_flops(type(abstract).encode, abstract, images) == USUAL.forward(encoder_work(config, 64))
    assert flops.traced_flops(type(abstract).decode, abstract, latents) == USUAL.forward(decoder_work(config, 64))
    for taps in range(1, config.num_taps + 1) if name in ("SD", "TAESD") else [config.num_taps]:

        def last(autoencoder, z, taps=taps):
            return autoencoder.features(z, taps)[-1].sum()

        work = decoder_work(config, 64, taps)
        assert flops.traced_flops(last, abstract, latents) == USUAL.forward(work)
        gradient = flops.traced_flops(jax.grad(last, argnums=1), abstract, latents)
        assert gradient == USUAL.forward(work) + USUAL.input_backward(work)


def test_traced_counts_of_control_flow():
    square = jnp.zeros((4, 4))

    def scanned(x):
        return jax.lax.scan(lambda carry, _: (carry @ carry, None), x, length=5)[0]

    def branched(x):
        return jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x)

    product = 2 * 4**3
    assert flops.traced_flops(scanned, square) == 5 * product
    assert flops.traced_flops(scanned, square, loops=False) == product
    assert flops.traced_flops(branched, square) == 2 * product
    assert flops.traced_flops(jax.vmap(scanned), jnp.zeros((3, 4, 4))) == 15 * product
    # What is computed again counts as often as it is computed.
    gradient = jax.grad(jax.checkpoint(lambda x: jnp.sin(x @ x).sum()))
    assert flops.traced_flops(gradient, square) == 4 * product


# --- conventions and parts ---


def test_conventions_differ_where_they_say():
    parts = {c.name: step_flops(c, PAPER_MODEL, SD, 512, decoded=0.5) for c in flops.CONVENTIONS}
    paper, usual = parts["paper"], parts["usual"]
    work, decoder = denoiser_work(PAPER_MODEL, 64), decoder_work(SD, 512, 5)
    assert usual.encoder == 0 and paper.encoder == PAPER.forward(encoder_work(SD, 512))
    assert usual.denoiser_backward == 2 * usual.denoiser_forward == 2 * paper.denoiser_forward
    assert paper.denoiser_backward - usual.denoiser_backward == work.attention - 2 * work.first
    assert usual.predicted_backward - 2 * decoder.attention == paper.clean_decode
    assert paper.total == paper.base + 0.5 * (2 * paper.clean_decode + paper.predicted_backward)


def test_only_the_taps_that_the_loss_compares_are_decoded():
    by_taps = [step_flops(USUAL, PAPER_MODEL, SD, 512, LPLConfig.paper(taps=n)).clean_decode for n in range(1, 6)]
    assert by_taps == sorted(set(by_taps))
    # Forward multiply-adds per block at 512 px: mid, then four up blocks.
    steps = [b - a for a, b in zip([0, *by_taps], by_taps, strict=False)]
    assert [round(step / 2e9) for step in steps] == [60, 97, 387, 434, 279]
    image = step_flops(USUAL, PAPER_MODEL, SD, 512, LPLConfig.paper(taps="rgb")).clean_decode
    assert image - by_taps[-1] == 2 * 512 * 512 * 128 * 3 * 9
    skipped = step_flops(USUAL, PAPER_MODEL, SD, 512, LPLConfig.reference()).clean_decode
    assert by_taps[-1] - skipped == 2 * 64 * 64 * 4 * 4


def test_mistakes_are_named():
    with pytest.raises(InputError, match="multiples of 8"):
        encoder_work(SD, 100)
    with pytest.raises(InputError, match="taps=6"):
        decoder_work(SD, 64, 6)
    with pytest.raises(InputError, match="patch_size"):
        denoiser_work(MMDiTConfig(hidden=64, depth=1, heads=2, num_classes=2), 9)
    with pytest.raises(InputError, match="decoded=1.5"):
        step_flops(USUAL, PAPER_MODEL, SD, 256, decoded=1.5)


def test_text_tower_counts_what_is_traced():
    source = TextSource("bundled", length=9, pooled=False)
    conditioner = abstract_conditioner(source, TextConfig(16, layers=3, heads=2, mlp_width=24))
    tokens = {"tokens": jax.ShapeDtypeStruct((1, 9), jnp.int32)}
    work = flops.text_work(conditioner.clip.config.text, 9)
    assert flops.traced_flops(lambda conditioner, batch: conditioner(batch), conditioner, tokens) == USUAL.forward(work)
