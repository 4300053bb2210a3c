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
from lpl_jax.tools.parity import denoisers as parity
from lpl_jax.tools.parity.torch_side import nhwc

LAYOUTS = parity.LAYOUTS | {
    "all dual": dict(dual_attention_layers=(0, 1), num_layers=2),
    "no table": dict(qk_norm="rms_norm", num_layers=3, pos_embed_max_size=None),  # positions computed
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


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request, tmp_path_factory):
    """A random network of diffusers in one of the layouts, and what we load from the folder that it writes."""
    folder = tmp_path_factory.mktemp("theirs")
    theirs = parity.random_torch({"pos_embed_max_size": 12} | LAYOUTS[request.param], folder)
    return theirs, *load(folder)


def test_network_equals_diffusers(pair):
    theirs, ours, params = pair
    # 12 x 6 patches, where the base grid is 8 x 8: all the rows of the table, and its middle columns.
    given = parity.example(ours.config, (24, 12))
    got, want = jit(ours.apply)({"params": params}, *given), nhwc(parity.torch_prediction(theirs, *given))
    # Relative to the size of the output; the sinusoids of the time differ by up to 6e-5 (float32 angles up to 871).
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def test_what_is_saved_again_is_the_same_to_diffusers(pair, tmp_path):
    theirs, ours, params = pair
    save(ours.config, params, tmp_path / "again")
    again = SD3Transformer2DModel.from_pretrained(tmp_path / "again")
    want, got = theirs.state_dict(), again.state_dict()
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
    fields = {name: getattr(theirs.config, name) for name in parity.TINY}
    assert {name: getattr(again.config, name) for name in parity.TINY} == fields


@pytest.mark.parametrize("pair", ["SD3.5 medium"], indirect=True)
def test_each_kind_of_block_equals_diffusers(pair):
    theirs, ours, params = pair
    config = ours.config
    rng = np.random.default_rng(0)
    shapes = (2, 9, config.hidden), (2, 5, config.hidden), (2, config.hidden)
    x, y, c = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
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
