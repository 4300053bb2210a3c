"""metadata.jsonl and metadata.csv in folders of images, as Hugging Face's `imagefolder` reads them.

A row names an image in its column `file_name`, relative to the folder of the metadata file; `label` is its class (a
number or a name), and every other column may be a caption.
"""

import csv
import io
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lpl_jax.data.captions import parse_json
from lpl_jax.data.listing import Listing, natural, read_listed
from lpl_jax.data.records import MOST_CLASSES
from lpl_jax.errors import InputError
from lpl_jax.io.texts import decode_text

NAMES = ("metadata.jsonl", "metadata.csv")
UNREAD = "metadata.parquet"
MOST_BYTES = 2**32  # of a metadata file: 300 bytes for each of 14 million images
FILE, LABEL = "file_name", "label"


class Metadata(NamedTuple):
    """Rows of all metadata files by the image that they are of, and key and reason of what cannot be used."""

    rows: dict[str, dict[str, Any]]
    unusable: list[tuple[str, str]]


def read_metadata(folder: Path, files: Listing) -> Metadata | None:
    """What the metadata files among the files of a folder say of its images; None where there are none.

    An image that no row names is unusable, and so is a row whose image is not there.

    Raises:
      InputError: a file that is no such metadata, or two of them in one folder.
    """
    if unread := next((name for name in files.others if posixpath.basename(name).lower() == UNREAD), None):
        raise InputError(f"{folder / unread} is not read: possible: {' or '.join(NAMES)}")
    found = [name for name in files.sides if posixpath.basename(name).lower() in NAMES]
    if not found:
        return None
    places = [posixpath.dirname(name) for name in found]
    if double := next((name for name, place in zip(found, places, strict=True) if places.count(place) > 1), None):
        raise InputError(f"{folder / double}: there is another one of {' and '.join(NAMES)} beside it: give one")
    images, rows, unusable = set(files.images), {}, []
    for name in found:
        for line, row in _rows(folder / name):
            place = f"{name}, line {line}"
            if not isinstance(row, dict) or not isinstance(row.get(FILE), str) or not row[FILE]:
                unusable.append((place, f"{folder / name}, line {line}: is no row with a {FILE}"))
                continue
            image = posixpath.normpath(posixpath.join(posixpath.dirname(name), row[FILE].replace("\\", "/")))
            if image in rows:
                unusable.append(
                    (place, f"{folder / name}, line {line}: {image} is named twice; the first row is taken")
                )
            elif image in images:
                rows[image] = {column: value for column, value in row.items() if column != FILE}
            elif image not in files.others:
                unusable.append((place, f"{folder / name}, line {line}: {image} is not there, or no image"))
    unusable += [(name, f"{folder / name}: {found[0]} does not name it") for name in files.images if name not in rows]
    return Metadata(rows, unusable)


def metadata_labels(rows: dict[str, dict[str, Any]]) -> tuple[tuple[str, ...], dict[str, int], dict[str, str]]:
    """Class names, label by image, and images without a label with the reason; no classes where no row has a label.

    Numbers are labels as they are, and the names of their classes; names are sorted in natural order.
    """
    if not any(_label(row) is not None for row in rows.values()):
        return (), {}, {}
    found, refused = {}, {}
    for image, row in rows.items():
        label = _label(row)
        if label is None or not label.strip():
            refused[image] = f"its row of metadata has no {LABEL}, as others have"
        else:
            found[image] = label
    if all(label.isascii() and label.isdecimal() for label in found.values()):
        for image in [image for image, label in found.items() if len(label) > 9 or int(label) >= MOST_CLASSES]:
            refused[image] = f"its {LABEL} {found.pop(image)[:20]} is no number of a class, 0 to {MOST_CLASSES - 1}"
        labels = {image: int(label) for image, label in found.items()}
        return tuple(map(str, range(max(labels.values(), default=-1) + 1))), labels, refused
    names = sorted(set(found.values()), key=natural)
    numbers = {name: number for number, name in enumerate(names)}
    return tuple(names), {image: numbers[label] for image, label in found.items()}, refused


def _label(row: dict[str, Any]) -> str | None:
    value = row.get(LABEL)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        return None
    return str(value)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number of its line, row) of a metadata file; a line that is no JSON is None."""
    try:
        text = decode_text(read_listed(path, MOST_BYTES), str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text), strict=True)
        try:
            if FILE not in (reader.fieldnames or ()):
                raise InputError(f"{path} has no column {FILE}: it has {', '.join((reader.fieldnames or ())[:8])}")
            for row in reader:
                yield reader.line_num, None if None in row or None in row.values() else row
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: is no CSV ({error})") from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, parse_json(line, "row")
            except InputError:
                yield number, None
