"""The two-stream block and the whole text-conditioned network against diffusers' Stable Diffusion 3."""

import jax
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock

from lpl_jax.denoisers import MMDiT, MMDiTConfig
from lpl_jax.denoisers.blocks import JointBlock

HIDDEN, HEADS, TEXT, POOLED = 64, 4, 24, 40
CONFIG = MMDiTConfig(hidden=HIDDEN, depth=3, heads=HEADS, context_dim=TEXT, pooled_dim=POOLED, base_grid=8)


def randomize(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def linear(layer):
    return {"kernel": layer.weight.detach().numpy().T, "bias": layer.bias.detach().numpy()}


def scale(layer):
    return {"scale": layer.weight.detach().numpy()}


def scale_shift(layer):
    """Two-chunk modulation: diffusers has the scale first."""
    both = linear(layer)
    return {name: np.roll(value, HIDDEN, axis=-1) for name, value in both.items()}


def mlp(ff):
    return {"fc1": linear(ff.net[0].proj), "fc2": linear(ff.net[2])}


def embedder(layer):
    return {"fc1": linear(layer.linear_1), "fc2": linear(layer.linear_2)}


def block_params(block):
    a = block.attn
    params = {
        "image_modulation": linear(block.norm1.linear),
        "attn": {
            **{"q": linear(a.to_q), "k": linear(a.to_k), "v": linear(a.to_v), "out": linear(a.to_out[0])},
            **{"q_norm": scale(a.norm_q), "k_norm": scale(a.norm_k)},
        },
        "context_attn": {
            **{"q": linear(a.add_q_proj), "k": linear(a.add_k_proj), "v": linear(a.add_v_proj)},
            **{"q_norm": scale(a.norm_added_q), "k_norm": scale(a.norm_added_k)},
        },
        "mlp": mlp(block.ff),
    }
    if block.context_pre_only:
        return {**params, "context_modulation": scale_shift(block.norm1_context.linear)}
    params["context_attn"]["out"] = linear(a.to_add_out)
    return {
        **params,
        "context_modulation": linear(block.norm1_context.linear),
        "context_mlp": mlp(block.ff_context),
    }


@pytest.mark.parametrize("pre_only", [False, True])
def test_block_equals_diffusers(pre_only):
    theirs = randomize(JointTransformerBlock(HIDDEN, HEADS, HIDDEN // HEADS, pre_only, qk_norm="rms_norm"))
    rng = np.random.default_rng(0)
    x, y, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 9, HIDDEN), (2, 5, HIDDEN), (2, HIDDEN)))
    with torch.no_grad():
        want_y, want_x = theirs(*map(torch.from_numpy, (x, y, c)))
    c = jax.nn.silu(c)
    params = block_params(theirs)
    (got_x, got_y), _ = jax.jit(JointBlock(CONFIG, pre_only).apply)({"params": params}, (x, y), (c, c))
    # Outputs are of order 1 to 10 after sums over 64 to 256 products in float32.
    np.testing.assert_allclose(got_x, want_x, rtol=1e-5, atol=1e-5)
    if not pre_only:
        np.testing.assert_allclose(got_y, want_y, rtol=1e-5, atol=1e-5)


def test_network_equals_diffusers():
    theirs = randomize(
        SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=CONFIG.depth,
            attention_head_dim=HIDDEN // HEADS,
            num_attention_heads=HEADS,
            joint_attention_dim=TEXT,
            caption_projection_dim=HIDDEN,
            pooled_projection_dim=POOLED,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        )
    )
    rng = np.random.default_rng(1)
    latents, text, pooled = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((2, 16, 16, 4), (2, 5, TEXT), (2, POOLED))
    )
    time = np.array([3.0, 871.25], np.float32)
    with torch.no_grad():
        want = theirs(
            torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()), *map(torch.from_numpy, (text, pooled, time))
        ).sample

    blocks = [block_params(block) for block in theirs.transformer_blocks]
    patch = theirs.pos_embed.proj
    params = {
        "patch_embed": {
            "kernel": patch.weight.detach().numpy().transpose(2, 3, 1, 0).reshape(-1, HIDDEN),
            "bias": patch.bias.detach().numpy(),
        },
        "time_mlp": embedder(theirs.time_text_embed.timestep_embedder),
        "pooled_mlp": embedder(theirs.time_text_embed.text_embedder),
        "context_embed": linear(theirs.context_embedder),
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks[:-1]),
        "last_block": blocks[-1],
        "head": {"modulation": scale_shift(theirs.norm_out.linear), "out": linear(theirs.proj_out)},
    }
    got = jax.jit(MMDiT(CONFIG).apply)({"params": params}, latents, time, text, pooled)
    want = want.numpy().transpose(0, 2, 3, 1)
    # Relative to the size of the output; the sinusoids of the time differ by up to 6e-5 (float32 angles up to 871).
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
