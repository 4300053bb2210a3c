"""Tokens behind a block in the middle of the network, as the Self-Perceptual loss compares them."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax.denoisers import MMDiT, init, preset
from lpl_jax.denoisers.blocks import JointBlock
from lpl_jax.errors import InputError

LIGHT = preset("tiny", context_attn="shared", context_mlp="none", context_modulation_chunks=3, context_pre_only=False)
# Name -> config, and after how many blocks to stop: within each stack, at its end, behind the last block.
CASES = {
    "stack_and_last": (preset("tiny"), (1, 3)),
    "two_stacks": (replace(LIGHT, depth=4, dual_attention=2), (1, 3)),
}
SD3 = CASES["stack_and_last"][0]

jit = partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


@partial(jit, static_argnames="stop_after")
def features(config, params, inputs, stop_after):
    return MMDiT(config).apply({"params": params}, *inputs, stop_after=stop_after)


def loop(config, streams, conditioning, params, tokens):
    """The blocks one by one, without scan; appends what each makes of the image stream."""
    for i in range(config.depth):
        last, dual = config.context_pre_only and i == config.depth - 1, i < config.dual_attention
        name = "dual_blocks" if dual else "blocks"
        if last:
            own = params["last_block"]
        else:
            own = jax.tree.map(lambda stack, n=i - config.stacks[name].start: stack[n], params[name])
        streams, _ = JointBlock(config, pre_only=last, dual=dual).apply({"params": own}, streams, conditioning)
        tokens.append(streams[0])
    return streams


@pytest.mark.parametrize(("config", "counts"), CASES.values(), ids=CASES)
def test_tokens_equal_those_of_a_loop_over_the_blocks(config, counts, random_params, example, monkeypatch):
    params, inputs = random_params(config), example(config, height=4, width=8)

    found = {count: features(config, params, inputs, stop_after=count) for count in counts}

    @jit
    def looped(config, params, inputs):
        tokens = []
        monkeypatch.setattr("lpl_jax.denoisers.mmdit.apply_blocks", partial(loop, params=params, tokens=tokens))
        MMDiT(config).apply({"params": params}, *inputs)
        return tokens

    expected = looped(config, params, inputs)
    assert len(expected) == config.depth
    for before, after in itertools.pairwise(expected):
        assert np.abs(after - before).max() > 0.1
    for count, tokens in found.items():
        wanted = expected[count - 1]
        assert tokens.shape == (2, 8, 64)
        assert tokens.dtype == jnp.float32
        np.testing.assert_allclose(tokens, wanted, rtol=1e-5, atol=2e-6 * np.abs(wanted).max(), err_msg=f"{count}")


def test_blocks_behind_are_not_computed_and_remat_is_kept(random_params, example):
    config = replace(LIGHT, depth=6)
    params, inputs = jax.eval_shape(lambda: random_params(config)), example(config, height=32, width=32)

    def kept(remat, stop_after):
        """Bytes that the backward pass is given for the gradient of the latents."""
        model = MMDiT(replace(config, remat=remat))

        def tokens(params, latents):
            return model.apply({"params": params}, latents, *inputs[1:], stop_after=stop_after)

        _, pullback = jax.eval_shape(lambda p, z: jax.vjp(partial(tokens, p), z), params, inputs[0])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))

    two, four, six = (kept("none", n) for n in (2, 4, 6))
    np.testing.assert_allclose(four - two, six - four, rtol=0.05)  # so much for two blocks
    assert four - two > 0.25 * six
    assert kept("full", 4) < 0.3 * four

    def lengths(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan":
                yield equation.params["length"]
            for inner in jax.core.jaxprs_in_params(equation.params):
                yield from lengths(inner)

    jaxpr = jax.make_jaxpr(lambda p: MMDiT(config).apply({"params": p}, *inputs, stop_after=2))(params)
    assert list(lengths(jaxpr.jaxpr)) == [2]


def test_tokens_are_float32_whatever_the_network_computes_in(random_params, example):
    config = replace(LIGHT, dtype="bfloat16")
    params = jax.eval_shape(lambda: random_params(config))

    def tokens(params, *inputs):
        return MMDiT(config).apply({"params": params}, *inputs, stop_after=2)

    assert jax.eval_shape(tokens, params, *example(config)).dtype == jnp.float32


@pytest.mark.parametrize("block", [0, 4, 1.0, True])
def test_block_that_there_is_not_is_refused(block, example):
    params = jax.eval_shape(partial(init, SD3), jax.random.key(0))
    with pytest.raises(InputError, match=rf"stop_after = {block} given, possible is a block from 1 to depth = 3"):
        jax.eval_shape(lambda p: MMDiT(SD3).apply({"params": p}, *example(SD3), stop_after=block), params)


def test_initialisation_takes_all_of_the_network(example):
    with pytest.raises(InputError, match="at initialisation"):
        jax.eval_shape(partial(MMDiT(SD3).init, stop_after=1), jax.random.key(0), *example(SD3))
