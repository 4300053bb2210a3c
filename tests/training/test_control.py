"""Conditioning on original size and crop, and the guidance law of the companion paper (arXiv 2411.03177)."""

import numpy as np
import pytest

from lpl_jax.errors import InputError
from lpl_jax.experiment import SamplingConfig, build
from lpl_jax.runs import open_run
from lpl_jax.training import train


@pytest.mark.slow
def test_a_run_that_is_told_size_and_crop(tiny_config, tmp_path):
    config = tiny_config(train__steps=4)
    config.model.control = True
    result = train(build(config), tmp_path)
    run = open_run(tmp_path)
    params = run.params(weights="params")
    assert run.experiment.model.control and {"size_mlp", "crop_mlp"} <= set(params)
    assert np.abs(params["size_mlp"]["fc2"]["bias"]).max() > 0  # zero at first: the head moves, modulation, this
    assert result.step == 4
    images = run.sampler(weights="params", steps=2, guidance=1.5)([0, 1])
    assert images.shape == (2, 32, 32, 3)


@pytest.mark.parametrize(
    "guidance, side, resolution, expected",
    [(1.5, None, 512, 1.5), (1.5, 256, 512, 2.0), (1.5, 256, 256, 1.5), (1.0, 256, 512, 1.0)],
)
def test_guidance_law(guidance, side, resolution, expected):
    assert SamplingConfig(guidance=guidance, guidance_resolution=side).guidance_at(resolution) == expected


def test_guidance_law_needs_a_size():
    with pytest.raises(InputError, match="sampling.guidance_resolution=0"):
        SamplingConfig(guidance_resolution=0)
