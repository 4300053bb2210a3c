"""What a source of images gives: examples, cut into units of work that several hosts can share out among themselves.

A source with random access (`ImageSource`) knows its length, and is cut into units of so many examples. A
source that can only be read in order (`StreamSource`: tar files) says itself what its units are. `work_units`
makes the two alike: there is one way to write a store.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from typing_extensions import TypeIs

from lpl_jax.data import decoding
from lpl_jax.data.images import Crop
from lpl_jax.io.fingerprints import fingerprint_values


class Example(NamedTuple):
    """One image of a source.

    Attributes:
      image: uint8 (H, W, 3).
      label: class index.
      key: a name that is unique in its source.
      control: int32 (2, 4), original size and crop offsets of the image [as is, mirrored], see `Crop.with_control`.
      captions: one for each of the source's `caption_columns`.
    """

    image: np.ndarray
    label: int
    key: str
    control: np.ndarray
    captions: tuple[str, ...] = ()


class Item(NamedTuple):
    """An example that has yet to be decoded: `load` gives it, or raises the InputError that says why it cannot.

    size: bytes of memory that it holds until then.
    """

    key: str
    load: Callable[[], Example]
    size: int = 0


class Skipped(NamedTuple):
    """An image that is not in the store, the unit it would have come from, and why.

    tolerated: it is left out by a rule of the source, and `max_skipped` does not count it.
    """

    key: str
    unit: str
    reason: str
    tolerated: bool = False


class Note(NamedTuple):
    """Something that whoever reads a source should be told, in a line; nothing is left out because of it."""

    text: str


class Unit(NamedTuple):
    """A part of a source that is read from the front by one host and becomes one file of a store."""

    name: str
    items: Callable[[], Iterator[Item | Skipped | Note]]


class _Described(Protocol):
    """What every source tells: the crop, and what it is.

    `description` is for people; `identity` says by parts what decides the examples, with fingerprints of the files, and
    `fingerprint` (hexadecimal) of all of it is equal only for sources with the same examples.
    """

    crop: Crop
    description: str

    @property
    def identity(self) -> Mapping[str, str]:
        """Part -> what it is. It is found out when it is first asked for, which may take a look at every file."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of the identity."""
        ...

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes, by label."""
        ...

    @property
    def caption_columns(self) -> Sequence[str]:
        """Names of the captions that each example has."""
        ...


class ImageSource(_Described, Protocol):
    """A source of known length; every example is a pure function of its index."""

    @property
    def unusable(self) -> Sequence[tuple[str, str]]:
        """Key and reason of files that it has seen but that are none of its examples."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What it has to tell besides, a line each."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def key(self, index: int) -> str:
        """The example's name, unique in its source, without reading the example."""
        ...


class StreamSource(_Described, Protocol):
    """A source that is read unit by unit."""

    def units(self) -> Sequence[Unit]:
        """Its units, in order."""
        ...


class Identified:
    """Of sources that have an `identity`: its fingerprint."""

    crop: Crop
    caption_columns: Sequence[str]

    @functools.cached_property
    def _identity(self) -> Mapping[str, str]:
        raise NotImplementedError

    @property
    def identity(self) -> Mapping[str, str]:
        """Part -> what it is. It is found out when it is first asked for, which may take a look at every file."""
        return self._identity

    @property
    def fingerprint(self) -> str:
        """Hexadecimal; of the identity."""
        return fingerprint_values(self.identity)

    def _options(self, kind: str) -> dict[str, str]:
        """The parts of an identity that every source has."""
        parts = {"kind": kind, "crop": str(self.crop), "resolution": str(self.crop.resolution)}
        return parts | {"captions": ", ".join(self.caption_columns), "rules of decoding": decoding.RULES}


Source: TypeAlias = ImageSource | StreamSource


def is_stream(source: Source) -> TypeIs[StreamSource]:
    """Whether a source can only be read from the front, so that its length is not known."""
    return hasattr(source, "units")


def work_units(source: Source, records: int) -> Sequence[Unit]:
    """The units of a source; `records`: examples in a unit of a source that does not say itself what its units are.

    What such a source tells besides its examples comes with the first of them.
    """
    if is_stream(source):
        return source.units()

    def items(start: int) -> Iterator[Item | Skipped | Note]:
        if start == 0:
            yield from map(Note, source.notes)
            yield from (Skipped(key, names[0], reason) for key, reason in source.unusable)
        for index in range(start, min(start + records, len(source))):
            yield Item(source.key(index), functools.partial(source.__getitem__, index))

    parts = range(0, len(source), records)
    names = [f"{start}-{min(start + records, len(source)) - 1}" for start in parts]
    return [Unit(name, functools.partial(items, start)) for name, start in zip(names, parts, strict=True)]
