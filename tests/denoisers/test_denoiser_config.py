"""Presets have the sizes that they are named for; options change the parameters as stated; mistakes are named."""

import math
from dataclasses import replace

import jax
import pytest

from lpl_jax.denoisers import PRESETS, MMDiTConfig, init, preset
from lpl_jax.errors import InputError

EXACT = {
    "tiny": 426_192,
    "small": 8_813_840,
    "paper796": 786_393_808,
    "xl_two_stream": 1_326_904_720,
    "sd3_faithful": 2_357_847_056,
    "literal1536": 816_602_640,
}


def count(config):
    """Parameters of the network as it is built."""
    shapes = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def closed_form(c):
    """Parameters by the formulas of the architecture, written without looking at the network."""
    d = c.hidden

    def linear(i, o):
        return i * o + o

    attention, mlp = 4 * linear(d, d) + 2 * c.head_dim * c.qk_norm, linear(d, 4 * d) + linear(4 * d, d)
    chunks = c.context_modulation_chunks
    modulation = {"per_block": lambda n: linear(d, n * d) if n else 0, "single": lambda n: n * d}[c.modulation]
    block = attention + mlp + modulation(6) + modulation(chunks)
    block += attention if c.context_attn == "own" else 0
    block += mlp if c.context_mlp == "own" else 0
    total = c.depth * block + c.dual_attention * (attention + linear(d, 3 * d)) + c.position_table**2 * d
    if c.context_pre_only:  # the last context: no way out of the attention, no gates, no MLP
        total -= modulation(chunks) - modulation(2 if chunks else 0)
        total -= linear(d, d) if c.context_attn == "own" else 0
        total -= mlp if c.context_mlp == "own" else 0
    if c.modulation == "single":
        total += linear(d, 6 * d) + (linear(d, chunks * d) if chunks else 0)
    patch = c.patch_size**2 * c.latent_channels
    total += linear(patch, d) + linear(d, 2 * d) + linear(d, patch)
    total += linear(256, d) + linear(d, d)
    total += (linear(c.pooled_dim, d) + linear(d, d)) if c.pooled_dim else 0
    total += 2 * (linear(256, d) + linear(d, d)) if c.control else 0
    return total + ((c.num_classes + 1) * d if c.num_classes else linear(c.context_dim, d))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_exactly_the_stated_number_of_parameters(name):
    assert count(PRESETS[name]) == EXACT[name] == closed_form(PRESETS[name])


XL = MMDiTConfig(hidden=1152, depth=28, heads=16, num_classes=1000, context_pre_only=False)
LIGHT = dict(context_attn="shared", context_mlp="none", context_modulation_chunks=3)
ALL_SHARED = dict(context_attn="shared", context_mlp="shared", context_modulation_chunks=0)


SD3_MEDIUM = dict(
    hidden=1536,
    depth=24,
    heads=24,
    latent_channels=16,
    num_classes=0,
    context_dim=4096,
    pooled_dim=2048,
    context_pre_only=True,
    qk_norm=False,
)


@pytest.mark.parametrize(
    ("options", "millions"),
    [
        (dict(), 1344),
        (dict(context_pre_only=True), 1327),
        (dict(context_modulation_chunks=0), 1121),
        (dict(modulation="single"), 914),
        (dict(context_mlp="none", context_modulation_chunks=3), 935),
        (dict(context_mlp="shared", context_modulation_chunks=0, modulation="single"), 609),
        (LIGHT, 786),
        (dict(LIGHT, control=True, pooled_dim=768), 792),
        (ALL_SHARED, 675),
        (dict(ALL_SHARED, modulation="single"), 460),
        (dict(hidden=1536, heads=24), 2388),
        (dict(hidden=1536, heads=24, context_pre_only=True), 2358),
        (dict(ALL_SHARED, modulation="single", hidden=1536, heads=24), 817),
        (SD3_MEDIUM, 2028),
        (dict(SD3_MEDIUM, dual_attention=13, qk_norm=True, position_table=384), 2470),
        (dict(SD3_MEDIUM, hidden=2432, depth=38, heads=38, qk_norm=True), 8057),
    ],
)
def test_sharing_options_give_the_known_sizes_of_the_family(options, millions):
    config = replace(XL, **options)
    # The figures were made apart from this code and rounded either way; one matrix more or less is 1.3M.
    assert abs(count(config) / 1e6 - millions) < 0.6
    assert count(config) == closed_form(config)


def test_text_preset_replaces_the_class_table_by_a_linear():
    text = preset("tiny", num_classes=0, context_dim=32, pooled_dim=24)
    assert count(text) - count(PRESETS["tiny"]) == (33 - 11) * 64 + (25 + 65) * 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(heads=5), ["heads", "5", "divisor of hidden=64"]),
        (dict(hidden=66, heads=3), ["hidden", "66", "multiple of 4"]),
        (dict(depth=0), ["depth", "0", "1 to "]),
        (dict(patch_size=-2), ["patch_size", "-2"]),
        (dict(base_grid=0), ["base_grid", "0"]),
        (dict(mlp_ratio=2.5), ["mlp_ratio", "2.5", "whole number"]),
        (dict(num_classes=-1, context_dim=8), ["num_classes", "-1"]),
        (dict(context_dim=768), ["num_classes=10", "context_dim=768", "exactly one"]),
        (dict(num_classes=0), ["num_classes=0", "context_dim=0", "exactly one"]),
        (dict(context_attn="cross"), ["context_attn", "cross", "own, shared"]),
        (dict(context_mlp="half"), ["context_mlp", "half", "own, shared, none"]),
        (dict(modulation="none"), ["modulation", "per_block, single"]),
        (dict(remat="some"), ["remat", "some", "none, full, dots"]),
        (dict(attention="flash"), ["attention", "flash", "xla"]),
        (dict(dtype="float16"), ["dtype", "float16", "float32, bfloat16"]),
        (dict(control=1), ["control", "True or False"]),
        (dict(context_mlp="none"), ["context_modulation_chunks", "6", "3 (its own) or 0"]),
        (dict(context_modulation_chunks=3), ["context_modulation_chunks", "3", "6 (its own) or 0"]),
        (dict(qk_norm="rms_norm"), ["qk_norm", "'rms_norm'", "True or False"]),
        (dict(dual_attention=True), ["dual_attention", "True", "0 to 1,000"]),
        (dict(dual_attention=4), ["dual_attention", "4", "0 to 3 with depth=3"]),
        (dict(dual_attention=1, modulation="single"), ["dual_attention", "1", "0 to 0", "'single'"]),
        (dict(position_table=-8), ["position_table", "-8"]),
        (dict(width=64), ["width", "hidden", "depth"]),
    ],
)
def test_a_field_that_cannot_be_used_is_named_with_what_is_possible(change, words):
    with pytest.raises(InputError) as error:
        preset("tiny", **change)
    message = str(error.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_unknown_preset_is_named_with_the_presets():
    with pytest.raises(InputError, match="'huge'.*tiny, small, paper796"):
        preset("huge")


def test_a_patch_size_that_does_not_divide_the_latent_is_refused():
    config = PRESETS["tiny"]
    assert config.grid(32, 48) == (16, 24)
    for size in ((33, 32), (32, 33), (0, 32)):
        with pytest.raises(InputError, match=f"{size[0]} x {size[1]}.*patch_size = 2"):
            config.grid(*size)


def test_a_grid_beyond_the_position_table_is_refused():
    config = preset("tiny", position_table=12)
    assert config.grid(24, 16) == (12, 8)
    with pytest.raises(InputError, match="8 x 13 patches.*position_table = 12"):
        config.grid(16, 26)
