"""Folders of image files: one folder for each class, or all images in one."""

import functools
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lpl_jax.data.captions import MAX_BYTES, TXT, check_columns, read_captions
from lpl_jax.data.examples import Example, Identified
from lpl_jax.data.images import Crop
from lpl_jax.data.listing import Listing, list_files, name_text, read_listed
from lpl_jax.data.metadata import NAMES, Metadata, metadata_labels, read_metadata
from lpl_jax.errors import InputError, some
from lpl_jax.io.fingerprints import fingerprint_files, fingerprint_values
from lpl_jax.io.image_limits import DEFAULT, ImageLimits
from lpl_jax.io.paths import PathLike, to_path

UNLABELLED = ("all",)
SPLIT = re.compile(
    "(?P<set>.*[-_ ])?(?P<split>train|training|trn|val|valid|validation|dev|eval|test|testing|holdout)"
    "([-_ ]?(set|split|data|images|imgs))?([-_ ]?([0-9]+|[ab]))?",
    re.IGNORECASE,
)


class FolderSource(Identified):
    """A folder of class folders, as ImageNet users have it, or a folder that holds images itself.

    Classes are the folders in it, in natural order; images in subfolders of a class folder belong to the class. Images
    that lie in the folder itself are one class, "all". Which files are images says `listing`. Where there is a
    metadata.jsonl or metadata.csv (see `metadata`), it says which images there are and what class they have.

    Args:
      captions: caption columns: "txt" is the file NAME.txt beside the image NAME.jpg, every other name a column of the
        metadata, or a field of NAME.json.
      identity: how these files are told from others of their names, see `io.fingerprints`.
      limits: the largest image that is read.

    Raises:
      InputError: no such folder, no images, a class folder without images, images both in the folder and in folders of
        it, splits in place of classes, tar files; on access, an unreadable file, or a caption that is missing or empty.
    """

    def __init__(
        self,
        path: PathLike,
        resolution: int,
        *,
        captions: Sequence[str] = (),
        crop: str = "resize_center_crop",
        seed: int = 0,
        identity: str = "times",
        limits: ImageLimits = DEFAULT,
    ):
        self.path, self._limits = to_path(path, "a folder of images"), limits
        self._identified_by = identity
        self.crop = Crop(resolution, crop, seed=seed)
        self.caption_columns = check_columns(captions)
        if not self.path.is_dir():
            raise InputError(f"image folder {path}: no such folder")
        files = list_files(self.path)
        if files.images and files.tars:
            raise InputError(
                f"image folder {path}: holds images ({files.images[0]}) and tar files ({files.tars[0]}): either all "
                "images lie in tar files, or none"
            )
        metadata = read_metadata(self.path, files)
        if not any(name.lower() in NAMES for name in files.sides):  # metadata of the whole folder may have all splits
            _refuse_splits(self.path, files.images)
        self._rows = metadata.rows if metadata else {}
        found = _by_classes(self.path, files) if metadata is None else _by_metadata(self.path, files, metadata)
        self.class_names, self._files, self._labels, self.unusable, self.notes = found
        text = f", captions {', '.join(self.caption_columns)}" if self.caption_columns else ""
        classes = len(self.class_names)
        self.description = f"folder {path}: {len(self)} images of {classes} class{'es' * (classes > 1)}{text}"

    @functools.cached_property
    def _identity(self) -> Mapping[str, str]:
        """Of the images, of the files with their captions, and of what the metadata says."""
        columns, root = self.caption_columns, str(self.path)
        endings = [ending for ending, used in ((".txt", TXT in columns), (".json", set(columns) - {TXT})) if used]
        beside = [os.path.splitext(file)[0] + ending for file in self._files for ending in endings]  # noqa: PTH122
        files = {file: f"{root}/{file}" for file in (*self._files, *beside)}
        said = {"classes": self.class_names, "labels": self._labels, "rows": self._rows}
        labels = {"classes and metadata": fingerprint_values(said)}
        return self._options("folder") | labels | fingerprint_files(files, self._identified_by)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        name = self._files[index]
        file = self.path / name
        row = self._rows.get(name, {})
        in_row = any(column.split(".")[0] in row for column in self.caption_columns if column != TXT)

        def beside(ending: str) -> bytes | None:
            if ending == "json" and in_row:
                return json.dumps(row).encode()
            path = file.with_suffix(f".{ending}")
            return read_listed(path, MAX_BYTES) if path.is_file() else None

        captions = read_captions(self.caption_columns, beside, str(file))
        content = read_listed(file, self._limits.bytes)
        image, control = self.crop.read(content, index, str(file), self._limits)
        return Example(image, self._labels[index], name_text(name), control, captions)

    def key(self, index: int) -> str:
        """The file's path in the folder, as text."""
        return name_text(self._files[index])


class _Found(NamedTuple):
    """Class names, paths relative to the folder, their labels; and what a source tells of all other files."""

    class_names: tuple[str, ...]
    files: list[str]
    labels: list[int]
    unusable: list[tuple[str, str]]
    notes: list[str]


def _by_classes(folder, files: Listing) -> _Found:
    flat = [name for name in files.images if "/" not in name]
    deep = [name for name in files.images if "/" in name]
    if flat and deep:
        raise InputError(
            f"image folder {folder}: holds images ({flat[0]}) and folders of images ({deep[0].split('/')[0]}): either "
            "all images lie in the folder itself, or all in class folders"
        )
    classes = [name for name in files.folders if name not in files.loops]
    if flat:
        return _found(folder, files, UNLABELLED, dict.fromkeys(flat, 0), [])
    if not classes:
        raise InputError(
            f"image folder {folder}: has no class folders and no images (expected {folder}/CLASS/IMAGE.jpg or "
            f"{folder}/IMAGE.jpg){_instead(files, '')}"
        )
    held = Counter(name.split("/")[0] for name in deep)
    if empty := next((name for name in classes if not held[name]), None):
        raise InputError(f"class folder {folder / empty}: has no images{_instead(files, f'{empty}/')}")
    numbers = {name: label for label, name in enumerate(classes)}
    return _found(folder, files, classes, {name: numbers[name.split("/")[0]] for name in deep}, _nested(folder, deep))


def _by_metadata(folder, files: Listing, metadata: Metadata) -> _Found:
    names, labels, refused = metadata_labels(metadata.rows)
    notes = []
    if not names:
        names, labels = UNLABELLED, dict.fromkeys(metadata.rows, 0)
        if any("/" in name for name in labels):
            notes = [f"image folder {folder}: its metadata has no column label: all images are of one class"]
    if not labels:
        raise InputError(f"image folder {folder}: its metadata names no image that is there, or none with a label")
    ordered = {name: labels[name] for name in files.images if name in labels}
    found = _found(folder, files, names, ordered, notes)
    without = [(name, f"{folder / name}: {reason}") for name, reason in refused.items()]
    return found._replace(unusable=[*found.unusable, *metadata.unusable, *without])


def _found(folder, files: Listing, names: Sequence[str], labels: dict[str, int], notes: list[str]) -> _Found:
    """Puts together what was found: other files are unusable, and so is a second image with the same name as text."""
    unusable = [(name, f"{folder / name}: {reason}") for name, reason in files.others.items()]
    keys: dict[str, str] = {}
    twice = [name for name in labels if keys.setdefault(name_text(name), name) != name]
    unusable += [(name, f"{folder / name}: another file has this name, as text") for name in twice]
    notes = [*notes, *_about_links(folder, files)]
    if len(set(map(name_text, names))) < len(names):
        raise InputError(f"image folder {folder}: two classes have the same name, as text: rename one")
    kept = list(keys.values())
    return _Found(tuple(names), kept, [labels[name] for name in kept], unusable, notes)


def _refuse_splits(folder, images: Sequence[str]) -> None:
    """Raises InputError where the folders are splits of a data set, each with classes of its own perhaps."""
    deep = [name for name in images if "/" in name]
    classes = list(dict.fromkeys(name.split("/")[0] for name in deep))
    found = {name: match for name in classes if (match := SPLIT.fullmatch(name))}
    sets = Counter(match["set"] for match in found.values())
    # ILSVRC2012_img_train is a split beside ILSVRC2012_img_val; steam_train is none.
    splits = [name for name, match in found.items() if match["set"] is None or sets[match["set"]] > 1]
    nested = {name.split("/")[0] for name in deep if name.count("/") > 1}
    if splits and (len(splits) > 1 or len(splits) == len(classes) or splits[0] in nested):
        first = min(splits, key=lambda name: not found[name]["split"].lower().startswith("tr"))
        raise InputError(
            f"image folder {folder}: holds {_some_names(splits)}: splits, and no classes: did you mean "
            f"{folder / first}? (a class with such a name has to be renamed)"
        )
    if len(classes) == 1 and len(deep) == len(images):
        _refuse_splits(folder / classes[0], [name.split("/", 1)[1] for name in deep])


def _nested(folder, images: Sequence[str]) -> list[str]:
    """A note on folders in class folders, which are no classes."""
    inner = list(dict.fromkeys("/".join(name.split("/")[:2]) for name in images if name.count("/") > 1))
    if not inner:
        return []
    classes = {name.split("/")[0] for name in images}
    meant = f" (did you mean {folder / next(iter(classes))}?)" if len(classes) == 1 and len(inner) > 1 else ""
    return [
        f"image folder {folder}: folders in class folders are no classes: images in {_some_names(inner)} are of class "
        f"{inner[0].split('/')[0]}{' and so on' if len({name.split('/')[0] for name in inner}) > 1 else ''}{meant}"
    ]


def _about_links(folder, files: Listing) -> list[str]:
    notes = []
    if files.loops:
        notes.append(
            f"image folder {folder}: {_some_names(files.loops)} leads back to a folder that it lies in: not followed"
        )
    if files.again:
        notes.append(
            f"image folder {folder}: {_some_names(files.again)} is read in two places: its images are there twice"
        )
    return notes


def _some_names(names: Sequence[str]) -> str:
    return name_text(some(names))


def _instead(files: Listing, start: str) -> str:
    """What there is in place of images."""
    found = [reason for name, reason in files.others.items() if name.startswith(start)]
    return f"; {found[0]}" if found else ""
