"""Small image folders, a random tiny autoencoder, and a finished store."""

import functools
import io
import json
import tarfile
import types

import jax
import numpy as np
import pytest
from PIL import Image

from lpl_jax.autoencoders import AutoencoderConfig, init
from lpl_jax.data import FolderSource, TextOptions, WebDatasetSource, write_store


def save_image(path, width, height, seed=0):
    """A smooth random image: JPEG and resizing change it little."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Two classes, 11 images of different sizes, one of them smaller than the crops made of it."""
    root = tmp_path_factory.mktemp("images") / "train"
    sizes = [(41, 30), (30, 50), (24, 24), (10, 12), (33, 47)]
    for i in range(11):
        save_image(root / ("ant" if i % 2 else "bee") / f"{i:02d}.png", *sizes[i % 5], seed=i)
    return root


def random_autoencoder(name, seed):
    """A tiny autoencoder; its weights are drawn by numpy, because compiling `init` takes longer than these tests."""
    shapes = jax.eval_shape(functools.partial(init, AutoencoderConfig.tiny(name=name)), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="session")
def autoencoder():
    return random_autoencoder("tiny", 0)


@pytest.fixture(scope="session")
def other_autoencoder():
    """The same architecture with other weights."""
    return random_autoencoder("other", 1)


def tar_bytes(members, end=True):
    """A tar file of (name, content) pairs; without its end mark where `end` is false."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1700000000.5  # a fraction: its header comes in two parts
            tar.addfile(info, io.BytesIO(content))
        size = tar.offset
    return buffer.getvalue() if end else buffer.getvalue()[:size]


def sample(key, caption="a photo", seed=0, recaption=None, size=(40, 30)):
    """The members of one sample as img2dataset writes them."""
    encoded = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(encoded, "JPEG")
    fields = {"key": key, "caption": caption, "recaptions": [recaption]}
    return [
        (f"{key}.jpg", encoded.getvalue()),
        (f"{key}.json", json.dumps(fields).encode()),
        (f"{key}.txt", (caption or "").encode()),
    ]


@pytest.fixture(scope="session")
def tars():
    """How to make tar files: `tars.of(members, end=True)` and `tars.sample(key, ...)`."""
    return types.SimpleNamespace(of=tar_bytes, sample=sample)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Three tar files of 4 images each, with two captions."""
    root = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        keys = [f"{shard:05d}{i:04d}" for i in range(4)]
        members = [m for key in keys for m in sample(key, f"photo {key}", int(key), f"a long text on {key}")]
        (root / f"{shard:05d}.tar").write_bytes(tar_bytes(members))
    return root


@pytest.fixture(scope="session")
def text_store(tmp_path_factory, shards, autoencoder):
    """The 12 images and two caption columns, nine numbers each."""
    source = WebDatasetSource(str(shards), 24, captions=("txt", "recaptions.0"))
    path = tmp_path_factory.mktemp("text") / "latents"
    return write_store(path, source, autoencoder, batch_size=8, text=TextOptions(length=9))


@pytest.fixture(scope="session")
def store(tmp_path_factory, image_folder, autoencoder):
    """The 11 images in float16, in three shards."""
    path = tmp_path_factory.mktemp("store") / "latents"
    return write_store(path, FolderSource(image_folder, 24), autoencoder, batch_size=8, shard_records=4)
