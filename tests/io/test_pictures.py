"""Pictures that we make are known by their mark, and are none of the images of a folder."""

import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

import lpl_jax
from lpl_jax.data import FolderSource
from lpl_jax.evaluation.figures import captioned_rows, plot_losses
from lpl_jax.evaluation.image_sets import open_images
from lpl_jax.io.pictures import is_picture, write_figure, write_picture
from lpl_jax.tools import sample

ROOT = Path(lpl_jax.__file__).parent
matplotlib.use("Agg")


def figure(path):
    from matplotlib.figure import Figure

    made = Figure()
    made.subplots().plot([1, 2])
    write_figure(path, made, 30)


MADE = {
    "grid": lambda path: write_picture(path, captioned_rows(np.zeros((2, 8, 8, 3), np.uint8), ["a", "b"], 1)),
    "figure": figure,
    "losses": lambda path: plot_losses([("run", [{"step": 1, "diffusion_loss": 1.0}], 0)], path),
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("name", ["grid.png", "a/renamed.PNG"])
def test_what_we_made_of_images_is_none_of_them(tmp_path, kind, name):
    """Under any name, in a copy too, with and without what else we wrote beside it."""
    folder = tmp_path / "images"
    sample.write(folder, np.zeros((3, 8, 8, 3), np.uint8), ["a", "b", "lpl_jax picture"], {}, 1)
    (folder / "samples.json").unlink()
    (folder / "grid.png").unlink()
    MADE[kind](tmp_path / "made.png")
    assert is_picture(tmp_path / "made.png")
    flat = "/" not in name
    if not flat:
        (folder / "a").mkdir()
    shutil.copy(tmp_path / "made.png", folder / name)
    assert len(open_images(folder)) == 3
    assert len(FolderSource(folder, 8)) == 3


def test_a_drawn_image_is_one_whatever_its_prompt(tmp_path):
    sample.write(tmp_path, np.zeros((1, 8, 8, 3), np.uint8), ["tEXtlpl_jax picture"], {}, 1)
    assert not is_picture(next(tmp_path.glob("0000_*.png"))) and is_picture(tmp_path / "grid.png")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("RGB", (2, 2)).save(tmp_path / "photo.jpg")
    assert not any(map(is_picture, (tmp_path / "empty.png", tmp_path / "photo.jpg", tmp_path / "none.png")))


def test_every_picture_of_the_package_has_the_mark():
    """Whoever writes one does so by `io.pictures`; the images that `lpl sample` draws are the exception."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if any(call in path.read_text() for call in ('"PNG"', ".savefig(", ".imsave("))
    }
    assert found == {"io/pictures.py", "tools/sample.py", "data/containers.py", "data/decoding.py"}
