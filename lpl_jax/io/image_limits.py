"""How large an image may be: what configs, flags and the reader of images share."""

import dataclasses

from lpl_jax.errors import InputError
from lpl_jax.fields import whole

MOST_PIXELS = 178_956_970  # above it, Pillow refuses by itself
MOST_BYTES = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """The largest image that is read: pixels in its first picture, and bytes of its file. More is refused unread."""

    pixels: int = 89_478_485  # 256 MiB in 24 bits
    bytes: int = 2**28

    def __post_init__(self):
        for name, value, most in (("pixels", self.pixels, MOST_PIXELS), ("bytes", self.bytes, MOST_BYTES)):
            check = whole(1, most)
            if not check.holds(value):
                raise InputError(f"max_{name}={value}: possible: {check.possible}")


DEFAULT = ImageLimits()
