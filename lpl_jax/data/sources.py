"""Image sources: where square images come from, by name. Sources of known length are pure functions of the index."""

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lpl_jax.data.decoding import read_rgb
from lpl_jax.data.examples import Example, Identified, ImageSource, Source, is_stream
from lpl_jax.data.folders import FolderSource
from lpl_jax.data.images import Crop
from lpl_jax.data.tfds import TFDSSource
from lpl_jax.data.webdataset import WebDatasetSource, is_webdataset
from lpl_jax.errors import InputError
from lpl_jax.io.fingerprints import fingerprint_files, fingerprint_texts
from lpl_jax.io.image_limits import DEFAULT, ImageLimits
from lpl_jax.io.paths import PathLike, is_remote, to_path
from lpl_jax.redaction import refuse_credentials

# The colour photographs that are files of the scikit-image wheel itself; its other data sets are downloads.
PHOTOS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}


class PhotoSource(Identified):
    """Random square crops of eight colour photographs that come with scikit-image; the class is the photograph.

    Example i is crop i // 8 of photograph i % 8. Its position and size (a part between `side[0]` and `side[1]` of the
    shorter side) are drawn from (seed, i): other seeds give other crops of the same photographs.
    """

    def __init__(self, resolution: int, *, crops: int = 256, seed: int = 0, side: tuple[float, float] = (0.8, 1.0)):
        if crops < 1:
            raise InputError(f"crops={crops}: must be a positive number of crops per photograph")
        self.crop = Crop(resolution, "random_crop", side=side, seed=seed)
        self.crops = crops
        self.class_names, self.caption_columns = tuple(PHOTOS), ()
        self.unusable, self.notes = (), ()
        folder = _scikit_image_data()
        self._photos = [_photograph(folder / file) for file in PHOTOS.values()]
        self.description = f"scikit-image photographs: {crops} random crops of each of {len(PHOTOS)}"

    @functools.cached_property
    def _identity(self) -> Mapping[str, str]:
        """Of the photographs, by their content: another version of the package may have others."""
        files = {file: _scikit_image_data() / file for file in PHOTOS.values()}
        return self._options("photos") | {"crops": str(self.crops)} | fingerprint_files(files, "content")

    def __len__(self) -> int:
        return len(self._photos) * self.crops

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        crop, label = divmod(index, len(self._photos))
        name = self.class_names[label]
        image, control = self.crop.with_control(self._photos[label], index, name)
        return Example(image, label, f"{name}-{crop:05d}", control)

    def key(self, index: int) -> str:
        """PHOTOGRAPH-CROP."""
        crop, label = divmod(index, len(self._photos))
        return f"{self.class_names[label]}-{crop:05d}"


class Subset(Identified):
    """`limit` files of a source, drawn at random by `seed` and kept in the source's order; unusable ones among them."""

    def __init__(self, source: ImageSource, limit: int, seed: int = 0):
        if limit < 1:
            raise InputError(f"limit={limit}: must be a positive number of images")
        self.crop, self.class_names, self.caption_columns = source.crop, source.class_names, source.caption_columns
        self._source = source
        seen = len(source) + len(source.unusable)
        drawn = np.sort(np.random.default_rng(seed).permutation(seen)[:limit])
        self._indices = drawn[drawn < len(source)]
        self.unusable = [source.unusable[index - len(source)] for index in drawn[drawn >= len(source)]]
        self.notes = source.notes
        self.description = f"{len(self)} of {source.description}"

    @functools.cached_property
    def _identity(self) -> Mapping[str, str]:
        """That of the source, and of which of its images."""
        return {**self._source.identity, "subset": fingerprint_texts(*map(str, self._indices))}

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._indices[index])]

    def key(self, index: int) -> str:
        """Its name in the source."""
        return self._source.key(int(self._indices[index]))


def open_source(
    spec: str,
    resolution: int,
    *,
    crop: str | None = None,
    crops: int | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    captions: Sequence[str] | None = None,
    seed: int = 0,
    limit: int | None = None,
    identity: str = "times",
    limits: ImageLimits = DEFAULT,
) -> Source:
    """The source that a command line or a config names.

    Args:
      spec: `photos`, `tfds:NAME`, tar files of a webdataset (PATH/{00000..00099}.tar, a pattern with *, a folder that
        holds tar files, or a URL such as gs://BUCKET/FOLDER), or else a folder of images or of class folders.
      crop: a rule of `images.CROP_RULES`; None is random_crop for photos and resize_center_crop for the others.
      crops: random crops of each photograph; only for photos.
      split, data_dir: only for tfds.
      captions: caption columns: "txt" (the file beside an image) or a field of its json; of tfds, features. None is
        ("txt",) for a webdataset and () for the others; photos have none.
      identity: how files are told from others of their names, by their change "times" or their "content"; of photos it
        is always their content.
      limit: at most this many images, drawn at random by `seed`; of a webdataset the first of every tar file.
      limits: the largest image that is read. Larger ones are skipped, but do not make it another source: a store that
        was begun is resumed with other limits.

    Raises:
      InputError: an option that the source does not have, and all that the sources themselves raise.
    """
    refuse_credentials(spec, "source")
    kind = _kind(spec)
    photo_options = _given(crops=crops)
    tfds_options = _given(split=split, data_dir=data_dir)
    misplaced = (kind != "photos" and photo_options) or (kind != "tfds" and tfds_options)
    if misplaced:
        option, value = next(iter(misplaced.items()))
        owner = "photos" if option == "crops" else "tfds:NAME"
        raise InputError(f"{option}={value} with source {spec}: only source {owner} has this option")
    if kind == "photos":
        if crop not in (None, "random_crop"):
            raise InputError(f"crop={crop} with source photos: possible is random_crop")
        if captions:
            raise InputError(f"captions={', '.join(captions)} with source photos: these have no captions")
        source = PhotoSource(resolution, seed=seed, **photo_options)
        return source if limit is None else Subset(source, limit, seed)
    options = _given(seed=seed, crop=crop, captions=captions, identity=identity, limits=limits)
    if kind == "webdataset":
        return WebDatasetSource(spec, resolution, limit=limit, **options)
    if kind == "tfds":
        source = TFDSSource(spec.removeprefix("tfds:"), resolution, **options, **tfds_options)
    else:
        source = FolderSource(spec, resolution, **options)
    return source if limit is None else Subset(source, limit, seed)


def _kind(spec: str) -> str:
    if spec == "photos":
        return "photos"
    if spec.startswith("tfds:"):
        return "tfds"
    return "webdataset" if is_webdataset(spec) else "folder"


def check_outside(spec: str, out: PathLike) -> None:
    """Raises an InputError where a store would lie in the folder of images that it is made of, as files of that."""
    if _kind(spec) != "folder" or is_remote(out):
        return
    folder = to_path(spec, "data.source")
    if to_path(out).resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{out} lies in {spec}, the folder of images: give a folder outside of it")


def indexed(source: Source) -> ImageSource:
    """The source; raises an InputError where it is a stream, whose images cannot be taken by number."""
    if is_stream(source):
        raise InputError(
            f"{source.description}: tar files are read from the front only; give a folder of images to compare "
            "with (evaluation.reference)"
        )
    return source


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _photograph(path: Path) -> Image.Image:
    return read_rgb(path.read_bytes(), f"scikit-image photograph {path.name}")


def _scikit_image_data() -> Path:
    # The package is located, not imported: only its files are needed.
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("source photos: needs the package scikit-image (pip install scikit-image)")
    return Path(spec.submodule_search_locations[0]) / "data"
