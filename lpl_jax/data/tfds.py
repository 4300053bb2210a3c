"""TensorFlow data sets that are already prepared on disk, read without TensorFlow."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lpl_jax.data.captions import check_columns, clean_caption
from lpl_jax.data.decoding import damage
from lpl_jax.data.examples import Example, Identified
from lpl_jax.data.images import Crop
from lpl_jax.errors import InputError
from lpl_jax.io.fingerprints import fingerprint_files
from lpl_jax.io.image_limits import DEFAULT, ImageLimits
from lpl_jax.io.paths import PathLike, to_path
from lpl_jax.io.texts import decode_text

UNLABELLED = ("all",)


class TFDSSource(Identified):
    """A TensorFlow data set that is already prepared on disk in ArrayRecord format, read without TensorFlow.

    Args:
      name: as `tfds.builder` takes it, e.g. `imagenet2012` or `imagenet2012:5.1.0`.
      data_dir: where prepared data sets lie; None is tensorflow-datasets' own default.
      captions: features that hold a caption, or a list of captions, of which the first is taken.
      identity: how its files are told from others of their names, see `io.fingerprints`.
      limits: the largest image that is read.
      image_key, label_key: the features that hold the encoded image and the class. A data set with captions need not
        have a class: all its images are then one, "all".
    """

    def __init__(
        self,
        name: str,
        resolution: int,
        *,
        split: str = "train",
        data_dir: PathLike | None = None,
        captions: Sequence[str] = (),
        crop: str = "resize_center_crop",
        seed: int = 0,
        identity: str = "times",
        image_key: str = "image",
        label_key: str = "label",
        limits: ImageLimits = DEFAULT,
    ):
        self.crop = Crop(resolution, crop, seed=seed)
        self.caption_columns = check_columns(captions)
        self.unusable, self.notes, self._limits = (), (), limits
        self._prefix = f"{name}/{split}"
        data_dir = None if data_dir is None else to_path(data_dir, "data.data_dir")
        self._examples = _open(name, split, data_dir, image_key)
        info = self._examples.dataset_info
        labelled = label_key in info.features or not captions
        self._image_key, self._label_key = image_key, label_key if labelled else None
        for key in (image_key, *captions, *([label_key] if labelled else [])):
            if key not in info.features:
                raise InputError(f"TFDS data set {name}: has no feature {key!r}; possible: {', '.join(info.features)}")
        if labelled and not getattr(info.features[label_key], "num_classes", None):
            raise InputError(f"TFDS data set {name}: feature {label_key!r} is not a class label")
        self.class_names = tuple(info.features[label_key].names) if labelled else UNLABELLED
        self.description = f"TFDS {info.full_name}, split {split}: {len(self)} images"
        self._split, self._identified_by = split, identity

    @functools.cached_property
    def _identity(self) -> Mapping[str, str]:
        """Of the files of the split."""
        info = self._examples.dataset_info
        paths = [str(path) for path in info.splits[self._split].filepaths]
        files = fingerprint_files({path.rpartition("/")[2]: path for path in paths}, self._identified_by)
        return self._options("tfds") | {"name": info.full_name, "split": self._split} | files

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        key = self.key(index)
        with damage(key):  # array_record and the decoders of features have exceptions of many types
            example = self._examples[index]
            captions = tuple(_caption(example[column], column, key) for column in self.caption_columns)
            label = 0 if self._label_key is None else int(example[self._label_key])
            content = bytes(example[self._image_key])
        image, control = self.crop.read(content, index, key, self._limits)
        return Example(image, label, key, control, captions)

    def key(self, index: int) -> str:
        """NAME/SPLIT/INDEX."""
        return f"{self._prefix}/{index}"


def _caption(value, column: str, key: str) -> str:
    """The text of a feature: bytes, or a list of them."""
    if not isinstance(value, (str, bytes)):
        try:
            value = value[0]
        except (TypeError, IndexError, KeyError):
            raise InputError(f"{key}: feature {column!r} holds no text") from None
    if not isinstance(value, (str, bytes)):
        raise InputError(f"{key}: feature {column!r} holds no text, but {type(value).__name__}")
    name = f"{key}: its caption {column!r}"
    return clean_caption(decode_text(value, name) if isinstance(value, bytes) else value, name)


def _open(name: str, split: str, data_dir: Path | None, image_key: str) -> Any:
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
