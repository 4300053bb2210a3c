"""Rules of names between PyTorch's state dicts and our trees: every kind of tensor both ways, and what does not fit."""

import chex
import numpy as np
import pytest

from lpl_jax.errors import InputError
from lpl_jax.io.porting import Rule, export_params, import_params

RULES = (
    Rule("scale", "scale"),
    Rule("pos.table", "table/bias"),
    Rule("net.{i}.running_{statistic}", "layer_{i}/{statistic}"),
    Rule("net.{i}", "layer_{i}"),
    Rule("words", "words"),
)
THEIRS = {
    "scale": np.float32(3),
    "pos.table": np.arange(6.0).reshape(2, 3),
    "net.0.weight": np.arange(24.0).reshape(3, 2, 2, 2),
    "net.0.bias": np.arange(3.0),
    "net.1.weight": np.ones(3),
    "net.1.running_mean": np.zeros(3),
    "net.2.weight": np.arange(6.0).reshape(2, 3),
    "words.weight": np.arange(10.0).reshape(5, 2),
}
OURS = {
    "scale": THEIRS["scale"],
    "table": {"bias": THEIRS["pos.table"]},
    "layer_0": {"kernel": THEIRS["net.0.weight"].transpose(2, 3, 1, 0), "bias": THEIRS["net.0.bias"]},
    "layer_1": {"scale": THEIRS["net.1.weight"], "mean": THEIRS["net.1.running_mean"]},
    "layer_2": {"kernel": THEIRS["net.2.weight"].T},
    "words": {"embedding": THEIRS["words.weight"]},
}


def test_every_kind_of_tensor_goes_both_ways():
    chex.assert_trees_all_equal(import_params(THEIRS, RULES, OURS, where="here"), OURS)
    chex.assert_trees_all_equal(export_params(OURS, RULES), THEIRS)


def test_everything_that_does_not_fit_is_named():
    given = {name: tensor for name, tensor in THEIRS.items() if name != "pos.table"}
    given |= {"net.0.running_var": np.ones(3), "other.weight": np.ones(3), "net.2.weight": np.ones((3, 3))}
    with pytest.raises(InputError) as caught:
        import_params(given, RULES, OURS, where="here")
    message = str(caught.value)
    assert message.startswith("here: 4 parameters do not fit: ")
    for problem in (
        "missing table/bias",
        "surplus net.0.running_var",
        "surplus other.weight",
        "net.2.weight has shape (3, 3), layer_2/kernel needs (3, 2)",
    ):
        assert problem in message
    with pytest.raises(InputError, match="no rule to export the parameters unknown/kernel, unknown_too"):
        export_params(OURS | {"unknown": {"kernel": np.ones((2, 2))}, "unknown_too": np.ones(1)}, RULES)
