"""Pictures that we make of images (grids, sheets, figures), with a mark by which they are known.

Such a picture is written into the folder of the images that it shows, and is none of them: whoever reads a folder of
images leaves it out. The mark is a text in the PNG file, so it is known under any name and in any folder; an image that
a model drew has none.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lpl_jax.io.atomic import atomic_open
from lpl_jax.io.paths import PathLike, to_path

MARK, TEXT = "lpl_jax picture", "of images, not one of them"
CHUNK = f"tEXt{MARK}\0".encode()
HEAD = 2048  # bytes that it is in
SUFFIX = ".png"


def write_picture(path: PathLike, picture: Image.Image) -> None:
    """A PNG file with the mark."""
    about = PngInfo()
    about.add_text(MARK, TEXT)
    with atomic_open(path) as file:
        picture.save(file, "PNG", pnginfo=about)


def write_figure(path: PathLike, figure: Any, dpi: int) -> None:
    """A figure of matplotlib as a PNG file with the mark."""
    with atomic_open(path) as file:
        figure.savefig(file, dpi=dpi, format="png", metadata={MARK: TEXT})


def is_picture(path: PathLike) -> bool:
    """Whether a file is a picture that was written here."""
    path = to_path(path, remote=True)
    if path.suffix.lower() != SUFFIX:
        return False
    try:
        with path.open("rb") as file:
            return CHUNK in file.read(HEAD)
    except OSError:  # whoever reads the image says so
        return False


def without_pictures(folder: PathLike, names: Sequence[str]) -> list[str]:
    """The files of a folder, by their paths in it, that are none of our pictures. The head of every PNG is read."""
    folder = to_path(folder, remote=True)
    with ThreadPoolExecutor(16) as pool:
        ours = pool.map(lambda name: is_picture(folder / name), names) if names else ()
        return [name for name, is_ours in zip(names, ours, strict=True) if not is_ours]
