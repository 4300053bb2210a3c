"""Values that cannot be meant: each is one line that names the field, before anything is made of it.

All fields are tried, as the dataclasses have them: a new one is held to the same.
"""

import dataclasses
import math
import time

import pytest

from lpl_jax.configs import base
from lpl_jax.diffusion import PARADIGMS
from lpl_jax.errors import InputError
from lpl_jax.experiment import build
from lpl_jax.experiment.sections import SCALARS, SECTIONS
from lpl_jax.fields import hints, is_numeric, members
from lpl_jax.losses import ComparisonConfig, LPLConfig
from lpl_jax.text import TextSource

BUILT = build(base.get_config())
PARTS = {section: [getattr(BUILT, section)] for section in SECTIONS}
PARTS |= {
    "text": [TextSource("bundled")],
    "lpl": [LPLConfig.paper()],
    "paradigm": [kind() for kind in PARADIGMS.values()],
}
PARTS["comparison"] = [ComparisonConfig("self_perceptual", block=1)]
FIELDS = [
    (part, item)
    for part in [BUILT, *(part for parts in PARTS.values() for part in parts)]
    for item in dataclasses.fields(part)
]
NUMBERS = [(part, item) for part, item in FIELDS if is_numeric(hints(type(part))[item.name])]
NEVER = (math.nan, -math.inf, 1e30, -1e30, 2**63, -(2**63), 10**5000)
EDGES = (math.inf, 2**31, 2**32, 1e-300, 0, -1, -0.0, 1, 1.0, 0.5, True)
TEXTS = {"endless": "x" * 2**20, "of several lines": "a\nb", "with a zero": "a\0b"}


def name_of(part, item):
    return f"{part.section}.{item.name}" if part.section else item.name


def given(part, item, value):
    """The part with this value, and the line that it is refused with; one of the two is None."""
    several = [kind for kind in members(hints(type(part))[item.name]) if kind not in (int, float, type(None))]
    values = (value,) if any(getattr(kind, "__origin__", None) is tuple for kind in several) else value
    try:
        return dataclasses.replace(part, **{item.name: values}), None
    except InputError as error:
        return None, str(error)


def test_all_sections_are_tried():
    assert len(FIELDS) > 150 and len(NUMBERS) > 80
    assert {part.section for part, _ in NUMBERS} == {"", *SECTIONS} - {"autoencoder", "checkpoint"}
    assert set(SCALARS) == {item.name for part, item in NUMBERS if part is BUILT}


def test_every_number_has_a_finite_range():
    for part, item in NUMBERS:
        assert item.metadata["check"] is not None, name_of(part, item)
        for value in NEVER:
            _, line = given(part, item, value)
            assert line is not None, (name_of(part, item), value)
            assert line.startswith(f"{name_of(part, item)}=") and " is not possible: it must be " in line
            assert "\n" not in line and len(line) < 300
        accepted, _ = given(part, item, math.inf)
        assert accepted is None or "inf" in item.metadata["check"].possible, name_of(part, item)


def test_what_is_at_an_edge_is_accepted_or_a_line():
    for part, item in NUMBERS:
        for value in EDGES:
            accepted, line = given(part, item, value)
            if line is None:
                assert getattr(accepted, item.name) in (value, (value,))
            else:
                assert line and "\n" not in line and len(line) < 300


def test_tuples_are_short():
    for part, item in FIELDS:
        if any(getattr(kind, "__origin__", None) is tuple for kind in members(hints(type(part))[item.name])):
            with pytest.raises(
                InputError, match=r"=\(0, 0, .* is not possible: it must be .*up to \d+, each "
            ) as caught:
                dataclasses.replace(part, **{item.name: (0,) * 10**6})
            assert len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_are_lines(kind):
    tried = [(part, item) for part, item in FIELDS if str in members(hints(type(part))[item.name])]
    assert len(tried) > 25
    for part, item in tried:
        _, line = given(part, item, TEXTS[kind])
        assert line is not None and "\n" not in line and len(line) < 600, (name_of(part, item), line)
        assert line.startswith(name_of(part, item))


ABSURD = [
    ({"model.hidden": 65_536, "model.depth": 1000, "model.heads": 1}, "model.hidden=65536 and model.depth=1000 make 5"),
    ({"train.batch_size": 2**20, "resolution": 16_384}, "train.batch_size=1048576 at resolution=16384 are 2.8e"),
    ({"evaluation.batch_size": 2**20, "resolution": 16_384}, "evaluation.batch_size=1048576 at resolution=16384"),
    ({"paradigm.train_steps": 10**9}, "paradigm.train_steps=1000000000 is not possible: it must be 2 to 100,000"),
    ({"paradigm.beta_end": 0.9}, "paradigm.train_steps=1000 with beta_end=0.9 ends in noise alone"),
    ({"sampling.steps": 1001}, "sampling: steps must be an integer between 1 and 1000, got 1001"),
    ({"paradigm.name": "flow", "sampling.spacing": "leading"}, "sampling: spacing and offset belong to ddim"),
    ({"paradigm.name": "v", "sampling.spacing": "leading"}, "sampling: spacing='leading' never reaches the last index"),
    ({"ema.decays": (1.0,)}, "ema.decays=(1.0,) is not possible: it must be up to 16, each in [0, 0.9999999]"),
    (
        {"train.steps": 10**9, "train.checkpoint_every": 1, "train.keep_every": 1},
        "train.keep_every=1 keeps 999,999,999 checkpoints of train.steps=1000000000",
    ),
    ({"seed": 2**32}, "seed=4294967296 is not possible: it must be 0 to 4,294,967,295"),
]


@pytest.mark.parametrize(("changes", "message"), ABSURD, ids=lambda value: value if isinstance(value, str) else "")
def test_absurd_sizes_are_refused_at_once(changes, message):
    config = base.get_config().to_dict()
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        (config[section] if section else config)[field] = value
    began = time.perf_counter()
    with pytest.raises(InputError) as caught:
        build(config)
    assert time.perf_counter() - began < 1
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
