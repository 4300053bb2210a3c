"""Folders of image files: one folder for each class, or all images in one."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from lpl_jax.data.captions import TXT, check_columns, read_captions
from lpl_jax.data.examples import Example, Identified
from lpl_jax.data.images import Crop, read_rgb
from lpl_jax.errors import InputError
from lpl_jax.io.fingerprints import fingerprint_files
from lpl_jax.io.paths import PathLike, to_path
from lpl_jax.io.pictures import without_pictures

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
UNLABELLED = ("all",)


class FolderSource(Identified):
    """A folder of class folders, as ImageNet users have it, or a folder that holds images itself.

    Labels follow the sorted folder names; images that lie in the folder itself are one class, "all". Files that end in
    .jpeg, .jpg, .png, .webp or .bmp (in upper case too) are images, also in subfolders of a class folder; others are
    skipped.

    Args:
      captions: caption columns: "txt" is the file NAME.txt beside the image NAME.jpg, every other name a field of
        NAME.json.
      identity: how these files are told from others of their names, see `io.fingerprints`.

    Raises:
      InputError: no such folder, no images, a class folder without images, images both in the folder and in folders of
        it; on access, an unreadable file, or a caption that is missing or empty.
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
    ):
        self.path = to_path(path, "a folder of images")
        self._identified_by = identity
        self.crop = Crop(resolution, crop, seed=seed)
        self.caption_columns = check_columns(captions)
        if not self.path.is_dir():
            raise InputError(f"image folder {path}: no such folder")
        self.class_names, self._files, self._labels = _list(self.path)
        text = f", captions {', '.join(self.caption_columns)}" if self.caption_columns else ""
        classes = len(self.class_names)
        self.description = f"folder {path}: {len(self)} images of {classes} class{'es' * (classes > 1)}{text}"

    @functools.cached_property
    def _identity(self) -> Mapping[str, str]:
        """Of the images and of the files with their captions."""
        columns, root = self.caption_columns, str(self.path)
        endings = [ending for ending, used in ((".txt", TXT in columns), (".json", set(columns) - {TXT})) if used]
        beside = [os.path.splitext(file)[0] + ending for file in self._files for ending in endings]  # noqa: PTH122
        files = {file: f"{root}/{file}" for file in (*self._files, *beside)}
        return self._options("folder") | fingerprint_files(files, self._identified_by)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        file = self.path / self._files[index]

        def beside(ending: str) -> bytes | None:
            path = file.with_suffix(f".{ending}")
            return path.read_bytes() if path.is_file() else None

        captions = read_captions(self.caption_columns, beside, str(file))
        image, control = self.crop.with_control(read_rgb(file, str(file)), index, str(file))
        return Example(image, self._labels[index], self._files[index], control, captions)

    def key(self, index: int) -> str:
        """The file's path in the folder."""
        return self._files[index]


def _list(folder: Path) -> tuple[tuple[str, ...], list[str], list[int]]:
    """Class names, paths relative to the folder, and their labels."""
    entries = [entry for entry in folder.iterdir() if entry.name[0] != "."]
    flat = sorted(entry.name for entry in entries if entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file())
    flat = without_pictures(folder, flat)
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if flat:
        if mixed := next((name for name in classes if _images_below(folder / name)), None):
            raise InputError(
                f"image folder {folder}: holds images ({flat[0]}) and folders of images ({mixed}): either all images "
                "lie in the folder itself, or all in class folders"
            )
        return UNLABELLED, flat, [0] * len(flat)
    if not classes:
        raise InputError(
            f"image folder {folder}: has no class folders and no images (expected {folder}/CLASS/IMAGE.jpg or "
            f"{folder}/IMAGE.jpg)"
        )
    files, labels = [], []
    for label, name in enumerate(classes):
        found = _images_below(folder / name)
        if not found:
            raise InputError(f"class folder {folder / name}: has no images ({', '.join(IMAGE_SUFFIXES)})")
        files += [f"{name}/{file}" for file in found]
        labels += [label] * len(found)
    return tuple(classes), files, labels


def _images_below(folder: Path) -> list[str]:
    """Paths of the image files in a folder and its subfolders, relative to it, sorted; hidden ones are skipped."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    shown = sorted(str(file) for file in files if not any(part.startswith(".") for part in file.parts))
    return without_pictures(folder, shown)
