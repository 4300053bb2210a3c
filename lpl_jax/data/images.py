"""From an image file to a square uint8 array: the named crop rules, and where a crop lies in its image."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lpl_jax.data.decoding import decode
from lpl_jax.errors import InputError
from lpl_jax.io.image_limits import DEFAULT, ImageLimits

CROP_RULES = ("resize_center_crop", "center_crop", "random_crop")
LONG = 16  # an image is cut before it is resized where its longer side is more than so many shorter ones
REACH = 4  # pixels: of Lanczos' filter where it enlarges, and one more
# Endings of files that are images, wherever they lie; what is in them, `decoding` finds out from the content.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


@dataclass(frozen=True)
class Crop:
    """How an image of any size becomes a square of `resolution` pixels. All resizing is Lanczos, antialiased.

    Rules:
      resize_center_crop: resize so that the shorter side is `resolution` (smaller images are enlarged, by the same
        filter), then cut the centre square.
      center_crop: cut the centre square without resizing; a smaller image is an error.
      random_crop: cut a square whose side is a random part (between the two numbers `side`) of the shorter side, at a
        random position, and resize it to `resolution`. The draw is a pure function of (seed, index of the image).
    """

    resolution: int
    rule: str = "resize_center_crop"
    side: tuple[float, float] = (0.6, 1.0)
    seed: int = 0

    def __post_init__(self):
        if self.resolution < 1:
            raise InputError(f"resolution={self.resolution}: must be a positive number of pixels")
        if self.rule not in CROP_RULES:
            raise InputError(f"crop={self.rule!r}: possible are {', '.join(CROP_RULES)}")
        if not 0 < self.side[0] <= self.side[1] <= 1:
            raise InputError(f"side={self.side}: needs 0 < smallest <= largest <= 1 (parts of the shorter side)")
        if self.seed < 0:
            raise InputError(f"seed={self.seed}: must not be negative")

    def __str__(self) -> str:
        if self.rule == "random_crop":
            return f"random_crop(side={self.side[0]:g}-{self.side[1]:g}, seed={self.seed})"
        return self.rule

    def read(
        self, content: bytes, index: int, name: str, limits: ImageLimits = DEFAULT
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `with_control` gives of the image in the bytes of a file; raises as `decoding.read_rgb`, too."""
        return decode(content, name, lambda image: self.with_control(image, index, name), limits)

    def __call__(self, image: Image.Image, index: int, name: str) -> np.ndarray:
        """RGB image -> uint8 (resolution, resolution, 3); `index` seeds a random rule, `name` is for error messages."""
        return self.with_control(image, index, name)[0]

    def with_control(self, image: Image.Image, index: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The pixels that `__call__` gives, and what they show of which image, for conditioning on it.

        The second array is int32 (2, 4), in pixels: [as is, mirrored left to right] x [height, width, top, left].
        Height and width are those of the upright image, before any resizing; top and left are those of the crop in the
        resized image (the convention of SDXL: Podell et al. 2023, arXiv 2307.01952, Sec. 2.2). In the mirror image,
        left is resized width - resolution - left. random_crop cuts before it resizes: its top and left, in pixels of
        the image, are scaled by resolution / side of its square, as if it had resized first, and rounded to whole
        pixels.
        """
        if self.rule == "resize_center_crop":
            return _resize_and_cut(image, self.resolution)
        if self.rule == "center_crop":
            if min(image.size) < self.resolution:
                raise InputError(
                    f"{name}: {image.width}x{image.height} pixels are too few for crop=center_crop at "
                    f"{self.resolution}; resize_center_crop enlarges small images"
                )
            return _center(image, self.resolution, image.size)
        return self._random(image, np.random.default_rng((self.seed, index)))

    def _random(self, image: Image.Image, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        fraction, x, y = rng.uniform(size=3)
        low, high = self.side
        side = (low + (high - low) * fraction) * min(image.size)
        left, top = x * (image.width - side), y * (image.height - side)
        box = (left, top, left + side, top + side)
        size = self.resolution, self.resolution
        pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=box))
        offsets = top, left, image.width - side - left
        return pixels, _control(image.size, *(round(offset * self.resolution / side) for offset in offsets))


def _resize_and_cut(image: Image.Image, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    shorter = min(image.size)
    size = round(image.width * resolution / shorter), round(image.height * resolution / shorter)
    if max(image.size) > LONG * shorter:
        return _cut_and_resize(image, size, resolution)
    return _center(
        image if size == image.size else image.resize(size, Image.Resampling.LANCZOS), resolution, image.size
    )


def _cut_and_resize(image: Image.Image, size: tuple[int, int], resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """As resized to `size` and cut, up to rounding; but of a line of pixels only what is kept is ever enlarged."""
    original = image.size
    (width, height), (left, top) = original, ((side - resolution) // 2 for side in size)
    box = (
        left * width / size[0],
        top * height / size[1],
        (left + resolution) * width / size[0],
        (top + resolution) * height / size[1],
    )
    if resolution > min(original):  # Pillow's float32 would not tell places apart that are far out in few pixels
        x, y = max(math.floor(box[0]) - REACH, 0), max(math.floor(box[1]) - REACH, 0)
        image = image.crop((x, y, min(math.ceil(box[2]) + REACH, width), min(math.ceil(box[3]) + REACH, height)))
        box = box[0] - x, box[1] - y, box[2] - x, box[3] - y
    pixels = np.asarray(image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box))
    return pixels, _control(original, top, left, size[0] - resolution - left)


def _center(image: Image.Image, resolution: int, original: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    pixels = np.asarray(image.crop((left, top, left + resolution, top + resolution)))
    return pixels, _control(original, top, left, image.width - resolution - left)


def _control(original: tuple[int, int], top: int, left: int, mirrored_left: int) -> np.ndarray:
    width, height = original
    return np.array([[height, width, top, left], [height, width, top, mirrored_left]], np.int32)
