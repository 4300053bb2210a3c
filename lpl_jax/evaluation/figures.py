"""Pictures of a run: grids of images and curves of its metrics."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from lpl_jax.errors import InputError
from lpl_jax.io.paths import PathLike
from lpl_jax.io.pictures import write_figure

MARGIN = 4  # pixels between the images of a panel
TITLE = 18  # height of a panel's title
LINE, LETTER = 13, 6  # height of a line of a caption, and width of its letters


def panels(columns: Mapping[str, np.ndarray], *, per_row: int, zoom: int = 1) -> Image.Image:
    """Panels side by side, each a grid of images under its title.

    Args:
      columns: title -> uint8 images (N, H, W, 3), equally many and large in all.
      per_row: images in a row of a panel.
      zoom: every pixel becomes zoom x zoom.
    """
    shapes = {images.shape for images in columns.values()}
    if len(shapes) != 1:
        raise InputError(f"panels of different shapes: {sorted(shapes)}")
    tiles = [_tile(images, per_row, zoom) for images in columns.values()]
    height, width, gap = tiles[0].shape[0], tiles[0].shape[1], 3 * MARGIN
    picture = Image.new("RGB", (len(tiles) * (width + gap) - gap, height + TITLE), "white")
    draw = ImageDraw.Draw(picture)
    for index, (title, tile) in enumerate(zip(columns, tiles, strict=True)):
        left = index * (width + gap)
        draw.text((left + MARGIN, 3), title, fill="black")
        picture.paste(Image.fromarray(tile), (left, TITLE))
    return picture


def captioned_rows(images: np.ndarray, titles: Sequence[str], per_row: int, *, least: int = 320) -> Image.Image:
    """A row of images under each title, titles broken into as many lines as they need.

    Args:
      images: uint8 (N, H, W, 3), N = len(titles) * per_row.
      least: width of the picture in pixels at least, so that titles have room over small images.
    """
    height, width = images.shape[1:3]
    total = max(per_row * (width + MARGIN) + MARGIN, least)
    lines = [textwrap.wrap(title, max(20, total // LETTER)) or [""] for title in titles]
    rows = [len(found) * LINE + height + 2 * MARGIN for found in lines]
    picture = Image.new("RGB", (total, sum(rows)), "white")
    draw, top = ImageDraw.Draw(picture), 0
    for index, (found, room) in enumerate(zip(lines, rows, strict=True)):
        # The default font has no letters but Latin ones.
        shown = "\n".join(found).encode("latin-1", "replace").decode("latin-1")
        draw.multiline_text((MARGIN, top + 1), shown, fill="black", spacing=1)
        for place, image in enumerate(images[index * per_row : (index + 1) * per_row]):
            left = MARGIN + place * (width + MARGIN)
            picture.paste(Image.fromarray(image), (left, top + len(found) * LINE + MARGIN))
        top += room
    return picture


def _tile(images: np.ndarray, per_row: int, zoom: int) -> np.ndarray:
    count, height, width, _ = images.shape
    rows = -(-count // per_row)
    height, width = height * zoom + MARGIN, width * zoom + MARGIN
    tile = np.full((rows * height + MARGIN, per_row * width + MARGIN, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = (index // per_row) * height + MARGIN, (index % per_row) * width + MARGIN
        large = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
        tile[top : top + large.shape[0], left : left + large.shape[1]] = large
    return tile


def plot_losses(runs: Sequence[tuple[str, Sequence[Mapping], int]], path: PathLike) -> None:
    """Diffusion loss, perceptual loss and its share of several runs over the steps, as a PNG.

    Args:
      runs: (title, lines of the run's metrics, first step on the axis) of each; the last one shifts post-training
        to after its base run.
      path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {
        "diffusion_loss": "diffusion loss",
        "lpl": "perceptual loss (unweighted)",
        "lpl_share": "share of the total",
    }
    shown = [name for name in names if any(name in line for _, lines, _ in runs for line in lines)]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.5 * len(shown), 3.2), squeeze=False)
    for axis, name in zip(axes[0], shown, strict=True):
        for title, lines, first in runs:
            points = [(first + line["step"], line[name]) for line in lines if name in line]
            if points:
                axis.plot(*zip(*points, strict=True), label=title)
        axis.set_title(names[name])
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    write_figure(path, figure, 100)
    plt.close(figure)
