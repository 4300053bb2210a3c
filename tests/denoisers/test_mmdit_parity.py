"""Networks loaded from diffusers' folders against diffusers' Stable Diffusion 3, block by block and as a whole."""

from functools import partial

import jax
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel

from lpl_jax.denoisers import init, load, save
from lpl_jax.denoisers.blocks import JointBlock
from lpl_jax.denoisers.diffusers_layout import RULES, from_diffusers, to_diffusers, unstack
from lpl_jax.io.porting import import_params

HIDDEN, TEXT, POOLED = 64, 24, 40
TINY = dict(
    sample_size=16,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=4,
    joint_attention_dim=TEXT,
    caption_projection_dim=HIDDEN,
    pooled_projection_dim=POOLED,
    pos_embed_max_size=12,
)
LAYOUTS = {
    "sd3": dict(),  # no norm of queries and keys
    "sd3.5_medium": dict(qk_norm="rms_norm", dual_attention_layers=(0, 1), num_layers=4),
    "all_dual": dict(dual_attention_layers=(0, 1), num_layers=2),
    "no_table": dict(qk_norm="rms_norm", pos_embed_max_size=None),  # positions computed
}
# Most of the time here goes into compilation: unoptimised code is made in half of it.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
BIG = dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536)
PUBLISHED = {
    "sd3.5_medium": dict(BIG, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
    "sd3.5_large": dict(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, qk_norm="rms_norm"
    ),
}


def randomize(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # All that is stored, also the table of positions: it may differ from the formula that it is initialised by.
        for tensor in module.state_dict().values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return module.eval()


def inputs(height, width, seed=1):
    rng = np.random.default_rng(seed)
    shapes = ((2, height, width, 4), (2, 5, TEXT), (2, POOLED))
    latents, text, pooled = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return latents, np.array([3.0, 871.25], np.float32), text, pooled


def predict_theirs(model, latents, time, text, pooled):
    latents = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        return model(latents, *map(torch.from_numpy, (text, pooled, time))).sample.numpy().transpose(0, 2, 3, 1)


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request, tmp_path_factory):
    """A random network of diffusers in one of the layouts, and what we load from the folder that it writes."""
    theirs = randomize(SD3Transformer2DModel(**(TINY | LAYOUTS[request.param])))
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return theirs, *load(folder)


def test_network_equals_diffusers(pair):
    theirs, ours, params = pair
    # 12 x 6 patches, where the base grid is 8 x 8: all the rows of the table, and its middle columns.
    given = inputs(24, 12)
    got, want = jit(ours.apply)({"params": params}, *given), predict_theirs(theirs, *given)
    # Relative to the size of the output; the sinusoids of the time differ by up to 6e-5 (float32 angles up to 871).
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def test_what_is_saved_again_is_the_same_to_diffusers(pair, tmp_path):
    theirs, ours, params = pair
    save(ours.config, params, tmp_path / "again")
    again = SD3Transformer2DModel.from_pretrained(tmp_path / "again")
    want, got = theirs.state_dict(), again.state_dict()
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
    fields = {name: getattr(theirs.config, name) for name in TINY}
    assert {name: getattr(again.config, name) for name in TINY} == fields


@pytest.mark.parametrize("pair", ["sd3.5_medium"], indirect=True)
def test_each_kind_of_block_equals_diffusers(pair):
    theirs, ours, params = pair
    config = ours.config
    rng = np.random.default_rng(0)
    x, y, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 9, HIDDEN), (2, 5, HIDDEN), (2, HIDDEN)))
    kinds = {group: (places[-1], False, group == "dual_blocks") for group, places in config.stacks.items()}
    kinds["last_block"] = config.depth - 1, True, config.dual_attention == config.depth
    for group, (place, pre_only, dual) in kinds.items():
        own = params[group] if pre_only else jax.tree.map(lambda leaf: leaf[-1], params[group])
        activated = jax.nn.silu(c)
        block = jit(JointBlock(config, pre_only, dual).apply)
        (got_x, got_y), _ = block({"params": own}, (x, y), (activated, activated))
        with torch.no_grad():
            want_y, want_x = theirs.transformer_blocks[place](*map(torch.from_numpy, (x, y, c)))
        # Outputs are of order 1 to 10 after sums over 64 to 256 products in float32.
        np.testing.assert_allclose(got_x, want_x, rtol=1e-5, atol=1e-5)
        if not pre_only:
            np.testing.assert_allclose(got_y, want_y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_the_names_and_shapes_of_diffusers(name):
    with torch.device("meta"):
        theirs = SD3Transformer2DModel(**PUBLISHED[name])
    config = from_diffusers(dict(theirs.config), where=name)
    assert from_diffusers(to_diffusers(config), where=name) == config
    # Views of one zero have every shape and take no memory; whatever does not fit is an error.
    tensors = {key: np.broadcast_to(np.float32(0), value.shape) for key, value in theirs.state_dict().items()}
    shapes = jax.eval_shape(lambda: unstack(config, init(config, jax.random.key(0))))
    imported = import_params(tensors, RULES, shapes, where=name)
    assert len(jax.tree.leaves(imported)) == len(tensors)
