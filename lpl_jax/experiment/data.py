"""What a run learns from, and through which first stage."""

import dataclasses
from typing import Literal

from typing_extensions import override

from lpl_jax.errors import InputError
from lpl_jax.fields import Part, field, whole
from lpl_jax.io.image_limits import MOST_BYTES, MOST_PIXELS, ImageLimits
from lpl_jax.limits import CROPS, MOST_IMAGES


@dataclasses.dataclass(frozen=True)
class DataConfig(Part, section="data"):
    """Where latents come from: a store, which is prepared from an image source first if it does not exist."""

    source: str = field("photos", "photos | tfds:NAME | tar files of a webdataset | folder of images or class folders")
    store: str | None = field(None, "latent store; prepared from the source if missing. None: WORKDIR/latents")
    crop: Literal["resize_center_crop", "random_crop"] | None = field(
        None, "resize_center_crop | random_crop; None: random_crop for photos, else the former"
    )
    crops: int | None = field(None, "photos only: random crops of each photograph", CROPS)
    split: str | None = field(None, "tfds only: split, such as train")
    data_dir: str | None = field(None, "tfds only: where prepared data sets lie")
    caption_key: str | None = field(None, "captions: txt (file beside the image) | field of its json | tfds: feature")
    second_caption_key: str | None = field(None, "a second caption of each image, mixed by text.second_caption")
    limit: int | None = field(None, "largest number of images to use, drawn at random", MOST_IMAGES)
    identity: Literal["times", "content"] = field(
        "times", "how the source's files are told from others of their names: sizes and times | content (reads all)"
    )
    max_pixels: int = field(
        ImageLimits.pixels,
        "pixels of the largest image that is read; more is skipped, or refused in an evaluation",
        whole(1, MOST_PIXELS),
    )
    max_bytes: int = field(ImageLimits.bytes, "bytes of the largest file of an image", whole(1, MOST_BYTES))
    unfinished: bool = field(False, "train on the finished shards of a store that is still being written")

    @override
    def check(self) -> None:
        if self.second_caption_key is not None and self.caption_key is None:
            raise InputError(f"data.second_caption_key={self.second_caption_key}: give data.caption_key, the first one")

    @property
    def limits(self) -> ImageLimits:
        """The largest image that is read."""
        return ImageLimits(self.max_pixels, self.max_bytes)

    @property
    def captions(self) -> tuple[str, ...] | None:
        """Caption columns; None leaves them to the source."""
        return tuple(key for key in (self.caption_key, self.second_caption_key) if key is not None) or None


@dataclasses.dataclass(frozen=True)
class AutoencoderSource(Part, section="autoencoder"):
    """The frozen first stage; its decoder is also the perceptual loss's network."""

    source: str = field(
        "bundled", "bundled | folder in diffusers layout | file of weights | hub id owner/name[@REVISION]"
    )
    subfolder: str | None = field(None, "the autoencoder's folder inside a pipeline, such as vae")
    variant: str | None = field(None, "which weights, where there are several and none in full precision, such as fp16")
    dtype: Literal["float32", "bfloat16"] = field("float32", "compute type of encoder and decoder: float32 | bfloat16")
