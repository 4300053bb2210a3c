"""Captioned photographs, from tar files to pictures of prompts, through the commands that docs/text.md shows."""

import numpy as np
import pytest
from PIL import Image

from lpl_jax.configs import quickstart
from lpl_jax.data import LatentStore
from lpl_jax.experiment import build
from lpl_jax.tools import prepare, sample
from lpl_jax.training import train
from lpl_jax.training.logging import read_metrics


@pytest.mark.slow
@pytest.mark.shared
def test_captioned_photographs_become_pictures_of_prompts(shared, tmp_path):
    store = tmp_path / "latents"
    arguments = ["--source", shared / "data/captions", "--resolution", 64, "--out", store, "--tokens", 24, "--limit", 8]
    assert prepare.main(list(map(str, arguments))) == 0
    captions = [record.captions[0] for record in map(LatentStore(store).__getitem__, range(8))]
    assert all(len(caption.split()) > 3 for caption in captions)

    config = quickstart.get_config("text,lpl")
    config.data.store = str(store)
    config.model.hidden, config.model.depth, config.lpl.taps, config.lpl.weight = 32, 2, 2, 1.0
    config.train.batch_size, config.train.steps, config.train.log_every = 8, 6, 2
    config.loss.lpl_capacity = "8"
    assert train(build(config), tmp_path / "run").step == 6
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 3 and all(np.isfinite(line["lpl"]) and line["lpl_share"] > 0 for line in lines)

    arguments = ["--workdir", tmp_path / "run", "--prompts", store, "--limit", 2, "--prompt", "a dog in the snow"]
    assert sample.main([*map(str, arguments), "--count", "2", "--steps", "3"]) == 0
    files = sorted((tmp_path / "run" / "samples").glob("[0-9]*.png"))
    assert [Image.open(file).text["Description"] for file in files[::2]] == ["a dog in the snow", *captions[:2]]
    assert Image.open(files[0]).size == (64, 64)
