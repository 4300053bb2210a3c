"""The bundled text tower and its tokeniser: stable over machines and versions, and a usable code for words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax import text
from lpl_jax.errors import InputError
from lpl_jax.io.fingerprints import fingerprint


@pytest.fixture(scope="module")
def clip():
    return text.load("bundled")


@pytest.fixture(scope="module")
def tokenizer():
    return text.load_tokenizer("bundled")


def test_tokens_are_those_of_every_other_machine(tokenizer):
    rows = tokenizer(["A red Bird, flying", ""], length=8)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows[0], [32766, 20933, 31249, 13447, 12437, 3012, 32767, 32767])
    np.testing.assert_array_equal(rows[1], [32766] + 7 * [32767])
    np.testing.assert_array_equal(tokenizer("a RED\tbird ,flying", 8), rows[:1])
    assert tokenizer.vocab_size == 2**15 and len(tokenizer.fingerprint) == 64


def test_weights_are_those_of_every_other_machine(clip):
    assert fingerprint(clip.params) == "5035a2398f63cc59c21206cacb7560bf7794b20f51708d3df86383feaa2049c7"


def test_long_texts_lose_their_end(tokenizer):
    row = tokenizer("word " * 100)[0]
    assert row.shape == (77,) and row[-1] == tokenizer.eos and len(set(row[1:-1])) == 1
    with pytest.raises(InputError, match="no Unicode text"):
        tokenizer("\ud800")


def test_words_are_nearly_orthogonal_and_the_order_counts(clip, tokenizer):
    encode = jax.jit(lambda clip, tokens: clip.encode_text(tokens))
    words = ["dog", "cat", "bridge", "river", "mountain", "red", "blue", "green", "small", "large"]
    states = encode(clip, tokenizer(words, 6)).last[:, 1]
    unit = states / jnp.linalg.norm(states, axis=1, keepdims=True)
    cosines = np.abs(np.asarray(unit @ unit.T))[~np.eye(len(words), dtype=bool)]
    assert cosines.max() < 0.45 and cosines.mean() < 0.2
    pooled = encode(clip, tokenizer(["red dog", "dog red", "blue dog", "red dog"], 6)).pooled
    distance = np.linalg.norm(pooled - pooled[:1], axis=1)
    assert distance[3] == 0 and distance[1] > 0.5 and distance[2] > 0.5


def test_what_is_not_there(clip):
    with pytest.raises(InputError, match="bundled CLIP has no vision tower"):
        text.load("bundled", tower="vision")
    assert text.load("bundled", dtype=jnp.bfloat16).config.text.dtype == "bfloat16"
