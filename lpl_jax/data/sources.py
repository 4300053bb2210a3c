"""Image sources: where labelled square images come from. Every source is a pure function of the index."""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from lpl_jax.data.images import Crop, read_rgb
from lpl_jax.errors import InputError

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")

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


class Example(NamedTuple):
    """One labelled image: uint8 (H, W, 3), class index, a name that is unique in its source, and int32 (2, 4): original
    size and place of the crop, as `Crop.with_control` counts them, of the image [as is, mirrored].
    """

    image: np.ndarray
    label: int
    key: str
    control: np.ndarray


class ImageSource(Protocol):
    """What `prepare` needs: examples by index, the crop, class names, and who it is.

    `description` is for people; `fingerprint` (hexadecimal) is equal only for sources with the same examples.
    """

    crop: Crop
    class_names: Sequence[str]
    description: str
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class FolderSource:
    """A folder of class folders, as ImageNet users have it; labels follow the sorted folder names.

    Files that end in .jpeg, .jpg, .png, .webp or .bmp (in upper case too) are images, also in subfolders of a class
    folder; others are passed over.

    Raises:
      InputError: no such folder, no class folders, a class folder without images; on access, an unreadable file.
    """

    def __init__(self, path: str | Path, resolution: int, *, crop: str = "resize_center_crop", seed: int = 0):
        self.path = Path(path)
        self.crop = Crop(resolution, crop, seed=seed)
        if not self.path.is_dir():
            raise InputError(f"image folder {path}: no such folder")
        classes = sorted(entry.name for entry in self.path.iterdir() if entry.is_dir() and entry.name[0] != ".")
        if not classes:
            raise InputError(f"image folder {path}: has no class folders (expected {path}/CLASS/IMAGE.jpg)")
        self.class_names = tuple(classes)
        self._files, self._labels = [], []
        for label, name in enumerate(classes):
            files = _images_below(self.path / name)
            if not files:
                raise InputError(f"class folder {self.path / name}: has no images ({', '.join(IMAGE_SUFFIXES)})")
            self._files += [f"{name}/{file}" for file in files]
            self._labels += [label] * len(files)
        self.description = f"folder {path}: {len(self)} images of {len(classes)} classes"
        self.fingerprint = _digest("folder", str(self.crop), str(resolution), *self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        file = self.path / self._files[index]
        image, control = self.crop.with_control(read_rgb(file, str(file)), index, str(file))
        return Example(image, self._labels[index], self._files[index], control)


class PhotoSource:
    """Random square crops of eight colour photographs that come with scikit-image; the class is the photograph.

    Example i is crop i // 8 of photograph i % 8. Its place and size (a part between `side[0]` and `side[1]` of the
    shorter side) are drawn from (seed, i): other seeds give other crops of the same photographs.
    """

    def __init__(self, resolution: int, *, crops: int = 256, seed: int = 0, side: tuple[float, float] = (0.8, 1.0)):
        if crops < 1:
            raise InputError(f"crops={crops}: must be a positive number of crops per photograph")
        self.crop = Crop(resolution, "random_crop", side=side, seed=seed)
        self.crops = crops
        self.class_names = tuple(PHOTOS)
        folder = _scikit_image_data()
        self._photos = [read_rgb(folder / file, f"scikit-image photograph {file}") for file in PHOTOS.values()]
        self.description = f"scikit-image photographs: {crops} random crops of each of {len(PHOTOS)}"
        self.fingerprint = _digest("photos", str(self.crop), str(resolution), str(crops), *PHOTOS)

    def __len__(self) -> int:
        return len(self._photos) * self.crops

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        crop, label = divmod(index, len(self._photos))
        name = self.class_names[label]
        image, control = self.crop.with_control(self._photos[label], index, name)
        return Example(image, label, f"{name}-{crop:05d}", control)


class TFDSSource:
    """A TensorFlow data set that is already prepared on disk in ArrayRecord format, read without TensorFlow.

    Args:
      name: as `tfds.builder` takes it, e.g. `imagenet2012` or `imagenet2012:5.1.0`.
      data_dir: where prepared data sets lie; None is tensorflow-datasets' own default.
      image_key, label_key: the features that hold the encoded image and the class.
    """

    def __init__(
        self,
        name: str,
        resolution: int,
        *,
        split: str = "train",
        data_dir: str | Path | None = None,
        crop: str = "resize_center_crop",
        seed: int = 0,
        image_key: str = "image",
        label_key: str = "label",
    ):
        self.crop = Crop(resolution, crop, seed=seed)
        self._keys = image_key, label_key
        self._prefix = f"{name}/{split}"
        self._examples = _open_tfds(name, split, data_dir, image_key)
        info = self._examples.dataset_info
        for key in self._keys:
            if key not in info.features:
                raise InputError(f"TFDS data set {name}: has no feature {key!r}; possible: {', '.join(info.features)}")
        if not getattr(info.features[label_key], "num_classes", None):
            raise InputError(f"TFDS data set {name}: feature {label_key!r} is not a class label")
        self.class_names = tuple(info.features[label_key].names)
        self.description = f"TFDS {info.full_name}, split {split}: {len(self)} images"
        self.fingerprint = _digest("tfds", str(self.crop), str(resolution), info.full_name, split, str(len(self)))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        example = self._examples[index]
        key = f"{self._prefix}/{index}"
        encoded, label = (example[key] for key in self._keys)
        image, control = self.crop.with_control(read_rgb(bytes(encoded), key), index, key)
        return Example(image, int(label), key, control)


class Subset:
    """`limit` examples of a source, drawn at random by `seed` and kept in the source's order."""

    def __init__(self, source: ImageSource, limit: int, seed: int = 0):
        if limit < 1:
            raise InputError(f"limit={limit}: must be a positive number of images")
        self.crop, self.class_names = source.crop, source.class_names
        self._source = source
        self._indices = np.sort(np.random.default_rng(seed).permutation(len(source))[:limit])
        self.description = f"{len(self)} of {source.description}"
        self.fingerprint = _digest("subset", source.fingerprint, *map(str, self._indices))

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._indices[index])]


def open_source(
    spec: str,
    resolution: int,
    *,
    crop: str | None = None,
    crops: int | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> ImageSource:
    """The source that a command line or a config names: `photos`, `tfds:NAME`, or else the path of a folder of classes.

    Args:
      crop: a rule of `images.CROP_RULES`; None is random_crop for photos and resize_center_crop for the others.
      crops: random crops of each photograph; only for photos.
      split, data_dir: only for tfds.
      limit: at most so many images, drawn at random by `seed`.

    Raises:
      InputError: an option that the source does not have, and all that the sources themselves raise.
    """
    kind = "photos" if spec == "photos" else "tfds" if spec.startswith("tfds:") else "folder"
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
        source = PhotoSource(resolution, seed=seed, **photo_options)
    elif kind == "tfds":
        source = TFDSSource(spec.removeprefix("tfds:"), resolution, seed=seed, **_given(crop=crop), **tfds_options)
    else:
        source = FolderSource(spec, resolution, seed=seed, **_given(crop=crop))
    return source if limit is None else Subset(source, limit, seed)


def _given(**options):
    return {name: value for name, value in options.items() if value is not None}


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _images_below(folder: Path) -> list[str]:
    """Paths of the image files in a folder and its subfolders, relative to it, sorted; hidden ones are passed over."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(str(file) for file in files if not any(part.startswith(".") for part in file.parts))


def _scikit_image_data() -> Path:
    # The package is located, not imported: only its files are needed.
    spec = importlib.util.find_spec("skimage")
    if spec is None:
        raise InputError("source photos: needs the package scikit-image (pip install scikit-image)")
    return Path(spec.submodule_search_locations[0]) / "data"


def _open_tfds(name: str, split: str, data_dir: str | Path | None, image_key: str):
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f"source tfds:{name}: {error.name or error} is not installed; pip install 'lpl_jax[tfds]'"
        ) from None
    # Images stay encoded here, so that every source decodes alike (tensorflow-datasets takes OpenCV or PIL, by chance).
    decoders = {image_key: tfds.decode.SkipDecoding()}
    try:
        return tfds.data_source(name, split=split, data_dir=data_dir, download=False, decoders=decoders)
    except Exception as error:  # tensorflow-datasets raises nearly every type for a data set that is not there
        reason = str(error).strip("\"'").splitlines()[0]
        raise InputError(
            f"TFDS data set {name!r}, split {split!r}, data_dir {data_dir or 'default'}: {reason} Prepare it first: "
            f"pip install 'lpl_jax[tfds-build]' and tfds build {name} --file_format=array_record"
        ) from None
