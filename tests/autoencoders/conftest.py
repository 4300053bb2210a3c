"""Autoencoders of diffusers with random weights: every family at widths for tests, and at the published ones."""

import os
import shutil
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test talks to the hub

import pytest

from lpl_jax import autoencoders
from lpl_jax.tools.parity.autoencoders import FAMILIES, random_torch


class Pair(NamedTuple):
    model: Any  # in PyTorch
    ours: autoencoders.Autoencoder  # the same weights
    folder: Any  # where both came from
    family: str


@pytest.fixture(scope="session")
def make(tmp_path_factory):
    """family -> Pair; made once for the widths of tests, anew for the published ones."""
    made, large = {}, []

    def get(family):
        if family in made:
            return made[family]
        folder = tmp_path_factory.mktemp("family")
        pair = Pair(random_torch(family, folder), autoencoders.load(folder), folder, family)
        if family in FAMILIES:
            made[family] = pair
        else:
            large.append(folder)
        return pair

    yield get
    for folder in large:  # gigabytes that pytest would keep for three sessions
        shutil.rmtree(folder)


@pytest.fixture(params=FAMILIES)
def pair(request, make):
    return make(request.param)


@pytest.fixture
def sd(make):
    return make("SD")
