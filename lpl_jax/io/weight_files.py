"""The weights of a network in the layouts that people publish and trainers write: the one reader of every loader.

A folder may hold them as NAME.safetensors, .bin, .pt, .pth or .ckpt, whole or in parts with or without an index, in
several variants (NAME.fp16.safetensors); a file may be one of these, an index, or a checkpoint of something larger. In
a file, the tensors may be under a prefix (`module.`, `_orig_mod.`, `ema.`, `first_stage_model.`, ...).
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lpl_jax.errors import InputError, some
from lpl_jax.io.jsons import read_json
from lpl_jax.io.paths import is_plain_name
from lpl_jax.io.tensors import Tensor, open_file, parameters, read_tensors

# Names of files of weights, without variant and ending, in the order of preference; others where none of these is.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
ENDINGS = ("safetensors", "bin", "pt", "pth", "ckpt")
# Files to fetch from a hub repository; pickles only where there is nothing else.
PATTERNS = tuple(f"{stem}*.{ending}" for stem in STEMS for ending in ("safetensors", "safetensors.index*.json"))
PICKLES = tuple(f"{stem}*.{ending}" for stem in STEMS for ending in ("bin", "bin.index*.json"))
FULL_PRECISION = ("", "fp32")
MAX_INDEX = 2**28  # bytes
# What trainers write beside the weights.
_NOT_WEIGHTS = re.compile(r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|\.).*")
# Parts of a name that wrap a module, wherever they are; nothing of ours or of diffusers is called so.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PART = re.compile(r"-(\d{5})-of-(\d{5})")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Files of weights that are open: what is in them, before anything is read.

    tensors: by name, over all files. where: the file, index or first part, for messages. entry: which of several sets
    of weights in the files is meant, such as "ema". choices: the files it was looked for in, for messages.
    """

    tensors: Mapping[str, Tensor]
    where: str
    entry: str | None = None
    choices: str = ""

    def read(self, anchors: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """The tensors of one network, float32, under the names that they have without any prefix.

        Args:
          anchors: a tensor that every such network has, by its name without prefix; several where layouts differ, in
            the order in which they are looked for. What comes before it in the files is the prefix, and what has
            another prefix is something else's. Without a match every tensor is read.

        Raises:
          InputError: several such networks in the files and no `entry` to choose, or a tensor that is not read.
        """
        named: dict[str, Tensor] = {}
        for name, tensor in parameters(self.tensors).items():
            bare = _WRAPPERS.sub("", name)
            if bare in named:
                raise InputError(f"{self.where} has {some([bare])} twice, once as {some([name])}")
            named[bare] = tensor
        roots = next(filter(None, (_roots(named, anchor) for anchor in anchors)), [])
        root = self._choose(roots)
        others = tuple(other for other in roots if other != root and other.startswith(root))
        own = {
            name.removeprefix(root): tensor
            for name, tensor in named.items()
            if name.startswith(root) and not (others and name.startswith(others))
        }
        return read_tensors(own, self.where)

    def _choose(self, roots: Sequence[str]) -> str:
        """One of the prefixes: that of the entry, else none, else the only one."""
        if self.entry is not None:
            found = [root for root in roots if self.entry in root.split(".")]
            if len(found) != 1:
                there = some([root.rstrip(".") or "weights without a prefix" for root in roots]) or "nothing known"
                raise InputError(f"{self.where} has no variant {self.entry!r}: {self.choices}; inside: {there}")
            return found[0]
        if len(roots) > 1 and "" not in roots:
            names = some([root.rstrip(".") for root in roots])
            raise InputError(f"{self.where} has several sets of weights: {names}; choose one as the variant")
        return roots[0] if len(roots) == 1 else ""


def read_weights(path: Path, anchors: Sequence[str] = (), *, variant: str | None = None) -> dict[str, np.ndarray]:
    """The tensors of one network in a folder or file, float32: see `open_weights` and `Weights.read`."""
    return open_weights(path, variant=variant).read(anchors)


def open_weights(path: Path, *, variant: str | None = None) -> Weights:
    """The files of weights that a folder holds, or a file (an index names several) is.

    Of variants in a folder the one in full precision is taken, else the only one.

    Args:
      path: the folder or file.
      variant: the variant to take, such as "fp16" or "non_ema"; one that no file is named by is a set of weights inside
        of them (`Weights.entry`), such as "ema".

    Raises:
      InputError: no weights, several of which none is in full precision, an index or parts that do not fit, or a file
        that cannot be read.
    """
    if not path.is_dir():
        named = _parse(path)
        entry = None if named and named.variant == variant else variant
        return Weights(_open_all([path], path if path.suffix == ".json" else None), str(path), entry, path.name)
    chosen, found = _choose(path, variant)
    index = chosen.path if chosen.is_index else None
    entry = None if chosen.variant == variant else variant
    names = some([file.path.name for file in found])
    return Weights(_open_all(_parts_of(chosen, found), index), str(chosen.path), entry, names)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds any file that is named as weights are."""
    return any(_parse(file) for file in folder.iterdir() if file.is_file())


class _File(NamedTuple):
    """What a file's name says. part: (which, of how many); None: a whole one, or an index."""

    path: Path
    stem: str
    variant: str
    ending: str
    is_index: bool
    part: tuple[int, int] | None

    @property
    def rank(self) -> tuple[bool, int]:
        """Order of preference among the forms of the same weights: safetensors first; whole, index, parts."""
        return self.ending != "safetensors", 2 if self.part else int(self.is_index)


def _parse(path: Path) -> _File | None:
    """NAME[.VARIANT][-PART].ENDING, NAME[-PART][.VARIANT].ENDING, or NAME.ENDING.index.json with a variant anywhere."""
    part = _PART.search(path.name)
    stem, *rest = _PART.sub("", path.name).split(".")
    kind = next((word for word in rest if word in ENDINGS), None)
    index = rest[-1:] == ["json"] and "index" in rest
    if kind is None or _NOT_WEIGHTS.fullmatch(path.name) or not (index or rest[-1] == kind):
        return None
    variant = ".".join(word for word in rest if word not in (kind, "index", "json"))
    return _File(path, stem, variant, kind, index, (int(part[1]), int(part[2])) if part and not index else None)


def _choose(folder: Path, variant: str | None) -> tuple[_File, list[_File]]:
    """The whole file, the index or a part of the weights to read, and all files of weights in the folder."""
    found = sorted(
        filter(None, map(_parse, filter(Path.is_file, sorted(folder.iterdir())))), key=lambda file: file.rank
    )
    if not found:
        names = f"{STEMS[0]}.safetensors or {STEMS[1]}.safetensors"
        raise InputError(f"{folder} has no weights, such as {names}; possible endings: {', '.join(ENDINGS)}")
    stems = list(dict.fromkeys(file.stem for file in found))
    stem = next((stem for stem in STEMS if stem in stems), stems[0] if len(stems) == 1 else None)
    if stem is None:
        names = some([file.path.name for file in found])
        raise InputError(f"{folder} has weights of several names: {names}; give one of them itself")
    best: dict[str, _File] = {}
    for file in found:
        if file.stem == stem:
            best.setdefault(file.variant, file)
    if variant in best:
        return best[variant], found
    chosen = next((name for name in FULL_PRECISION if name in best), None)
    if chosen is None and (len(best) > 1 or variant in FULL_PRECISION):
        what = "several variants, none of them plain" if variant is None else f"no variant {variant!r}"
        names = some([file.path.name for file in best.values()])
        raise InputError(f"{folder} has {what}: {names}; choose a variant, or give one of them itself")
    return best[next(iter(best)) if chosen is None else chosen], found


def _parts_of(first: _File, found: Sequence[_File]) -> list[Path]:
    """The files that belong together with this one; itself, where it is no part."""
    if first.part is None:
        return [first.path]
    same = {file.part: file.path for file in found if file._replace(path=first.path, part=first.part) == first}
    count = first.part[1]
    if lacking := [number for number in range(1, count + 1) if (number, count) not in same]:
        raise InputError(f"{first.path.parent} lacks parts {some(lacking)} of {count} of {first.path.name}")
    return [same[number, count] for number in range(1, count + 1)]


def _open_all(files: Sequence[Path], index: Path | None) -> dict[str, Tensor]:
    """The tensors of the files, or of those that an index names, each of them there once and where the index says."""
    places = {} if index is None else _read_index(index)
    tensors: dict[str, Tensor] = {}
    found = {}
    for file in files if index is None else sorted({index.parent / shard for shard in places.values()}):
        part = open_file(file)
        if twice := sorted(tensors.keys() & part.keys()):
            raise InputError(f"{file} repeats tensors of another part: {some(twice)}")
        tensors |= part
        found |= dict.fromkeys(part, file.name)
    if astray := sorted(name for name, shard in places.items() if found.get(name) != shard):
        raise InputError(f"{index} names tensors that are not where it says: {some(astray)}")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> name of the file beside the index, which exists."""
    places = read_json(path, most=MAX_INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
        raise InputError(f"{path} has no weight_map of tensor names to file names")
    shards = sorted(set(places.values()))
    endings = tuple(f".{ending}" for ending in ENDINGS)
    if outside := [shard for shard in shards if not (is_plain_name(shard) and shard.endswith(endings))]:
        raise InputError(f"{path} names {some(map(repr, outside))}; possible: files of weights beside it")
    if absent := [shard for shard in shards if not (path.parent / shard).is_file()]:
        raise InputError(f"{path.parent} lacks {some(absent)}, which {path.name} names")
    return places


def _roots(tensors: Mapping[str, Tensor], anchor: str) -> list[str]:
    """What comes before a tensor of this name, wherever it occurs; a dot, or nothing, is what comes before the name."""
    found = (name.removesuffix(anchor) for name in tensors if name == anchor or name.endswith(f".{anchor}"))
    return sorted(set(found))
