"""A text tower for trying things without a download: the source "bundled". It knows no language.

The tokeniser hashes each word to a number; the tower has the shape of a small CLIP and frozen weights drawn from a
fixed seed. Its output is a code for the words of a prompt and their order in which different words are nearly
orthogonal: a denoiser can learn what each word of its own captions means, but "dog" is as far from "puppy" as from
"bridge", and a word that training did not show says nothing.
"""

import functools
import hashlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from typing_extensions import override

from lpl_jax.errors import InputError
from lpl_jax.text.config import ClipConfig, TextConfig
from lpl_jax.text.model import Clip, init
from lpl_jax.text.tokenizer import WordTokenizer, cleaned_words

NAME = "bundled"
VERSION = 1  # of words, hash and weights together: another number for whatever changes a token or an embedding
VOCABULARY = 2**15
CONFIG = TextConfig(
    width=128, layers=2, heads=4, mlp_width=256, vocab_size=VOCABULARY, positions=77, eos_token_id=VOCABULARY - 1
)
# What a token is outweighs where it stands and what stands before it: standard deviations of the tables, and a factor
# on what layers add to the stream.
TOKEN_SCALE, POSITION_SCALE, BRANCH_SCALE = 1.0, 0.3, 0.5


class HashTokenizer(WordTokenizer):
    """Texts -> token ids without a vocabulary: cleaned and cut into words as CLIP's, each hashed to an id.

    Two words share a number with probability 1 in 2^15. Start and end token are the two highest numbers; rows are
    filled up with the end token.
    """

    bos, eos, padding = VOCABULARY - 2, VOCABULARY - 1, VOCABULARY - 1
    vocab_size = VOCABULARY

    @functools.cached_property
    @override
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{NAME} words, version {VERSION}, {VOCABULARY} numbers".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of one text of any length, without start and end token."""
        return [_number(word) for word in cleaned_words(text)]


@functools.lru_cache(maxsize=2**17)
def _number(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big") % (VOCABULARY - 2)


def load(*, tower: str | None = None, dtype=jnp.float32) -> Clip:
    """The bundled tower: the same weights on every machine and with every version of JAX and NumPy.

    Raises:
      InputError: `tower="vision"`, which there is not.
    """
    if tower == "vision":
        raise InputError("the bundled CLIP has no vision tower: CLIPScore needs trained weights")
    dtype = jnp.dtype(dtype)
    config = ClipConfig(NAME, TextConfig(**{**vars(CONFIG), "dtype": dtype.name}))

    def cast(array):
        return jnp.asarray(array, dtype if array.ndim > 1 else jnp.float32)

    return Clip(jax.tree.map(cast, _params()), config)


def _params() -> Mapping:
    """Float32, from NumPy's legacy generator, whose stream is frozen."""
    shapes = jax.eval_shape(lambda: init(ClipConfig(NAME, CONFIG), jax.random.key(0)).params)
    random = np.random.RandomState(VERSION)
    params = {}
    for path, leaf in sorted(flatten_dict(shapes, sep="/").items()):
        if path.endswith("kernel"):
            scale = BRANCH_SCALE if "out_proj" in path or "fc2" in path else 1
            params[path] = random.standard_normal(leaf.shape) * scale * leaf.shape[0] ** -0.5
        elif path.endswith("embedding"):
            params[path] = random.standard_normal(leaf.shape) * (TOKEN_SCALE if "token" in path else POSITION_SCALE)
        else:
            params[path] = np.full(leaf.shape, path.endswith("scale"))
    return unflatten_dict({path: array.astype(np.float32) for path, array in params.items()}, sep="/")
