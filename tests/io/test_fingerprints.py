import numpy as np

from lpl_jax import autoencoders
from lpl_jax.io.fingerprints import fingerprint, fingerprint_texts, fingerprint_values

# Stores that were made name this: another number would refuse them all.
BUNDLED = "2d70a63b0accc033a8cf39c00957d71a03f3b5ca47caa4f320b5f4b6387fdaf3"


def test_stores_of_the_bundled_autoencoder_stay_valid():
    assert fingerprint(autoencoders.load("bundled").params) == BUNDLED


def test_names_shapes_and_values_of_parameters_count_and_nothing_else():
    params = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": np.ones(2, np.float32)}
    kernel = params["a"]["kernel"]
    same = [
        params,
        dict(reversed(params.items())),
        {"b": params["b"].astype(np.float64), "a": {"kernel": kernel.copy()}},
    ]
    others = [
        params | {"c": np.ones(1)},
        {"a": {"scale": kernel}, "b": params["b"]},
        params | {"a": {"kernel": kernel.reshape(3, 2)}},
        params | {"a": {"kernel": kernel + 1e-6}},
    ]
    assert len({fingerprint(each) for each in same}) == 1
    assert len({fingerprint(each) for each in [params, *others]}) == 1 + len(others)


def test_texts_count_with_their_ends():
    assert len({fingerprint_texts(*texts) for texts in (("ab",), ("a", "b"), ("a", "b", ""), ("\udcff",))}) == 4


def test_the_order_of_values_does_not_count():
    assert fingerprint_values({"a": 1, "b": None}) == fingerprint_values({"b": None, "a": 1})
    assert fingerprint_values({"a": 1}) != fingerprint_values({"a": 2})
