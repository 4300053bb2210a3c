"""Prompts as conditions: the tower's states, dropped prompts, padding, stored outputs; and what is refused."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from lpl_jax import text
from lpl_jax.errors import InputError
from lpl_jax.text.conditioning import replicate

SOURCE = text.TextSource("bundled", length=8)


@pytest.fixture(scope="module")
def loaded():
    return text.load_conditioner(SOURCE)


@pytest.fixture(scope="module")
def batch(loaded):
    return {"tokens": loaded[1](["a red bird", "two dogs on a long beach", "snow"], 8)}


def test_states_are_those_of_the_tower(loaded, batch):
    conditioner, _ = loaded
    found = conditioner(batch)
    features = text.load("bundled").encode_text(batch["tokens"])
    np.testing.assert_allclose(found.context, features.last, atol=1e-5)
    np.testing.assert_allclose(found.pooled, features.pooled, atol=1e-5)
    other = conditioner.replace(source=dataclasses.replace(SOURCE, layer="penultimate", pooled=False))
    other = other.replace(empty=conditioner.empty._replace(pooled=None))
    found = other(batch)
    np.testing.assert_allclose(found.context, features.penultimate, atol=1e-5)
    assert found.pooled is None


def test_dropped_prompts_are_the_empty_one_in_both_parts(loaded, batch):
    conditioner, tokenizer = loaded
    plain, empty = conditioner(batch), conditioner({"tokens": tokenizer(["", "", ""], 8)})
    found = conditioner(batch, np.array([False, True, False]))
    for part in ("context", "pooled"):
        mixed, kept, none = (np.asarray(getattr(each, part)) for each in (found, plain, empty))
        np.testing.assert_array_equal(mixed[[0, 2]], kept[[0, 2]])
        np.testing.assert_allclose(mixed[1], none[1], atol=1e-5)
        np.testing.assert_allclose(getattr(conditioner.no_prompt(3), part), none, atol=1e-5)
        assert np.abs(kept[1] - none[1]).max() > 0.1


def test_stored_outputs_stand_in_place_of_the_tower(loaded, batch):
    conditioner, _ = loaded
    conditioner = conditioner.replace(source=dataclasses.replace(SOURCE, embeddings="store"))
    stored = {"text_hidden": np.ones((3, 8, 128), np.float16), "text_pooled": np.full((3, 128), 2, np.float16)}
    found = conditioner(batch | stored, np.array([False, False, True]))
    assert found.context.dtype == found.pooled.dtype == np.float32
    assert np.all(found.context[:2] == 1) and np.all(found.pooled[:2] == 2)
    np.testing.assert_allclose(found.context[2], conditioner.empty.context[0], atol=1e-6)
    np.testing.assert_allclose(conditioner(batch).context, loaded[0](batch).context)  # a prompt while sampling
    with pytest.raises(InputError, match="lacks text_pooled"):
        conditioner(batch | {"text_hidden": stored["text_hidden"]})


def test_replicated_padding():
    context = np.random.default_rng(0).standard_normal((2, 7, 5)).astype(np.float32)
    lengths = np.array([3, 7])
    plain = np.asarray(replicate(context, lengths, None, 0.5))
    np.testing.assert_array_equal(plain[0], context[0, [0, 1, 2, 0, 1, 2, 0]])
    np.testing.assert_array_equal(plain[1], context[1])
    noisy = np.asarray(
        jax.vmap(lambda key: replicate(context, lengths, key, 0.5))(jax.random.split(jax.random.key(0), 999))
    )
    np.testing.assert_array_equal(noisy[:, 1], np.broadcast_to(context[1], noisy[:, 1].shape))
    # m = 3 repetitions: noise of 0.5 * sqrt(2) times the channel's deviation
    expected = 0.5 * np.sqrt(2) * context[0, :3].std(0)
    np.testing.assert_allclose((noisy[:, 0] - plain[0]).std((0, 1)), expected, rtol=0.03)


def test_padding_enters_prompts_and_the_empty_one(loaded, batch):
    conditioner, _ = loaded
    conditioner = conditioner.replace(source=dataclasses.replace(SOURCE, padding="replicate"))
    found, empty = conditioner(batch), conditioner.no_prompt(1)
    np.testing.assert_array_equal(found.context[2, 3:6], found.context[2, :3])  # start, snow, end
    np.testing.assert_array_equal(empty.context[0, 2:4], empty.context[0, :2])
    assert not np.array_equal(found.context, conditioner(batch, key=jax.random.key(0)).context)


def test_no_gradient_reaches_the_tower(loaded, batch):
    def total(params):
        clip = loaded[0].clip.replace(params=params)
        return loaded[0].replace(clip=clip)(batch).context.sum()

    params = loaded[0].clip.params
    chex.assert_trees_all_equal(jax.grad(total)(params), jax.tree.map(np.zeros_like, params))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(length=1), "text.length=1"),
        (dict(layer="first"), "layer='first' is not possible: it must be one of last, penultimate"),
        (dict(padding="zeros"), "keep, replicate"),
        (dict(second_caption=1.5), "second_caption=1.5"),
        (dict(padding_noise=-1.0), "padding_noise=-1.0"),
    ],
)
def test_sources_that_cannot_be(fields, message):
    with pytest.raises(InputError, match=message):
        text.TextSource("bundled", **fields)


def test_what_does_not_fit(loaded, batch, tmp_path):
    with pytest.raises(InputError, match="length=99: bundled takes up to 77 tokens"):
        text.load_conditioner(text.TextSource("bundled", length=99))
    with pytest.raises(InputError, match=r"tokens of shape \(3, 5\); needed: \(B, text.length = 8\)"):
        loaded[0]({"tokens": batch["tokens"][:, :5]})
    text.save(jax.jit(text.init, static_argnums=0)(text.ClipConfig.tiny(), jax.random.key(0)), tmp_path)
    with pytest.raises(InputError, match="take the tokeniser that belongs to the tower"):
        text.load_conditioner(text.TextSource(str(tmp_path), tokenizer="bundled", length=8))
