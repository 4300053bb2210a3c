"""docs/data.md: its commands in their order, on a few small images."""

import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lpl_jax
from lpl_jax.data import LatentStore
from lpl_jax.runs import checkpoints
from lpl_jax.tools import verbs

DOCUMENT = Path(lpl_jax.__file__).parents[1] / "docs/data.md"
# What makes a job of minutes one of seconds; nothing else is changed.
SMALL = ["model.hidden=16", "model.depth=2", "train.batch_size=8", "train.steps=1", "train.log_every=1"]


def documented():
    """Arguments of `lpl` in each command line of the document, continued lines joined."""
    text = DOCUMENT.read_text().replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^    lpl (.+)$", text, re.M)]


def picture(seed, size=(70, 64)):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(encoded, "JPEG")
    return encoded.getvalue()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the data that the document speaks of."""
    monkeypatch.chdir(tmp_path)
    for name in ("my_images", "my_photos", "my_shards"):
        Path(name).mkdir()
    for number in range(8):
        Path(f"my_images/{number}.jpg").write_bytes(picture(number))
        Path(f"my_photos/{number}.jpg").write_bytes(picture(number))
        Path(f"my_photos/{number}.txt").write_text(f"photo number {number}")
    for shard in range(2):
        with tarfile.open(f"my_shards/{shard:05d}.tar", "w") as tar:
            for number in range(4):
                fields = json.dumps({"caption": "a photo"}).encode()
                for ending, content in (("jpg", picture(number)), ("txt", b"a photo"), ("json", fields)):
                    info = tarfile.TarInfo(f"{shard:05d}{number:04d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    root = DOCUMENT.parents[1]
    Path("configs").symlink_to(root / "configs")
    return tmp_path


def test_the_document_has_three_ways_of_three_commands():
    assert [arguments[0] for arguments in documented()] == ["prepare", "store", "train"] * 3 + ["store"] * 2


@pytest.mark.slow
def test_the_documented_commands(place, capsys):
    for arguments in documented():
        if arguments[0] == "train":
            arguments += [f"--config.{change}" for change in SMALL]
        assert verbs.main(arguments) == 0, arguments
    for name in ("images", "captioned", "shards"):
        assert len(LatentStore(f"stores/{name}")) == 8
        assert np.asarray(Image.open(f"stores/{name}.png")).std() > 5
        assert checkpoints.steps(f"runs/{name}/checkpoints") == [1]
    assert "8 records in 1 shards, all in order" in capsys.readouterr().out
