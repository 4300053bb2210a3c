"""JSON as it comes from files: the one reader of all of them, and the check of what they say.

Whatever is damaged or hostile is an InputError of one line that names the file: too many bytes, another encoding,
nesting, numbers that are not finite or of thousands of digits, a name that is there twice. What an object has to hold
is said once, by the annotations of a NamedTuple or dataclass; ranges stand in them, too:

    class Shard(NamedTuple):
        file: FileName
        records: Count
        sha256: Digest

    shard = record(Shard, read_json(path), str(path))

A file of ours may hold a checksum of its own fields (`signed`, `checked`): then no change of it is believed.
"""

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeAlias, TypeVar, Union

from lpl_jax.errors import InputError, nearest, some
from lpl_jax.fields import Check, describe, fits, whole
from lpl_jax.io.fingerprints import fingerprint_values
from lpl_jax.io.paths import AnyPath, is_plain_name, is_remote, read_bounded
from lpl_jax.io.texts import decode_text, not_downloaded

T = TypeVar("T")

MAX_BYTES = 2**26  # of a file: configs have thousands, vocabularies and indices of weights millions
MAX_LARGE = 2**32  # of one that lists every image that was skipped, or every step
MAX_LINE = 2**20  # characters of a line of JSONL
MAX_DEPTH = 64  # of objects and lists in each other
MAX_DIGITS = 40  # of a whole number: transformers writes 10^30 for "no limit"
INTS = (-(2**63), 2**63 - 1)  # what fits where numbers are computed with
CHECKSUM = "checksum"

Count: TypeAlias = Annotated[int, whole(0, 2**63 - 1)]
FileName: TypeAlias = Annotated[str, Check(lambda name: is_plain_name(name), "the name of a file in the same folder")]
Digest: TypeAlias = Annotated[
    str, Check(lambda text: re.fullmatch(r"[0-9a-f]{64}", text) is not None, "a SHA-256 in hexadecimal")
]


def read_json(path: AnyPath, *, most: int = MAX_BYTES, finite: bool = True) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
      most: bytes that the file may have.
      finite: whether NaN and infinite numbers are refused.

    Raises:
      InputError: the file is missing, damaged or holds something else.
    """
    content = read_any(path, most=most, finite=finite)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {_kind(content)}; an object is needed")
    return content


def read_any(path: AnyPath, *, most: int = MAX_BYTES, finite: bool = True) -> Any:
    """As `read_json`, whatever the JSON in the file is."""
    content = _content(path, most)
    if kind := not_downloaded(content[:256]):
        raise InputError(f"{path} cannot be read as JSON: it is {kind}")
    return parse(content, str(path), finite=finite)


def read_lines(path: AnyPath, *, most: int = MAX_LARGE) -> Iterator[dict[str, Any]]:
    """The objects in the lines of a JSONL file of ours, one after the other; a last line without an end is left out.

    Raises:
      InputError: as `read_json`; names the line.
    """
    for number, line in enumerate(_content(path, most).split(b"\n")[:-1], 1):
        where = f"{path}: line {number}"
        if len(line) > MAX_LINE:
            raise InputError(f"{where} has {len(line):,} bytes: at most {MAX_LINE:,} are read")
        row = parse(line, where)
        if not isinstance(row, dict):
            raise InputError(f"{where} holds {_kind(row)}; an object is needed")
        yield row


def _content(path: AnyPath, most: int) -> bytes:
    try:
        if not is_remote(path) and path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(f"{path} cannot be read as JSON: it is a pipe or a device")  # which might never end
        return read_bounded(path, most)
    except OSError as error:
        raise InputError(f"{path} cannot be read as JSON: {error.strerror or error}") from error


def parse(content: str | bytes, name: str, *, finite: bool = True) -> Any:
    """The value of a JSON text, or of its bytes as `texts.decode_text` decodes them.

    name: what it is, for messages.

    Raises:
      InputError: no JSON, or a name that is twice in an object, numbers of more than `MAX_DIGITS` digits or (`finite`)
        not finite, more than `MAX_DEPTH` objects and lists in each other, halves of surrogate pairs.
    """
    text = decode_text(content, name) if isinstance(content, bytes) else content
    try:
        # A text of n characters is not deeper than n / 2, and C code counts what is deep enough to harm it.
        found = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_finite if finite else float,
            parse_constant=_no_number if finite else float,
        )
        _check_tree(found)
    except RecursionError:
        raise InputError(f"{name}: {_TOO_DEEP}") from None
    except ValueError as error:  # an InputError of the functions below, too
        if isinstance(error, InputError):
            raise InputError(f"{name}: {error}") from None
        raise InputError(f"{name} cannot be read as JSON: {error}") from None
    return found


_TOO_DEEP = f"objects and lists are more than {MAX_DEPTH} deep in each other"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InputError(f"{_shown(name)} is named twice")
        found[name] = value
    return found


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise InputError(f"a number of {len(text):,} digits: at most {MAX_DIGITS} are read")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InputError(f"{_shown(text)} is no finite number")
    return value


def _no_number(text: str) -> float:
    raise InputError(f"{text} is no finite number")


def _check_tree(content: Any) -> None:
    level, depth = [content], 0
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise InputError(_TOO_DEEP)
        level = [value for each in level for value in _inside(each)]


def _inside(content: dict[str, Any] | list[Any]) -> Iterator[Any]:
    values = content.values() if isinstance(content, dict) else content
    names = content if isinstance(content, dict) else ()
    for text in (*names, *(value for value in values if isinstance(value, str))):
        try:
            text.encode("utf-8", "surrogateescape")  # paths may hold bytes that are no text
        except UnicodeEncodeError:
            raise InputError(f"{_shown(text)} holds half of a surrogate pair") from None
    return iter(values)


# --- what an object has to hold ---


def record(cls: type[T], raw: Any, where: str) -> T:
    """An object as the NamedTuple or dataclass whose fields it has by name.

    Types are those of the annotations, in objects and lists in it too (tuple[X, ...], Mapping[str, X], other such
    classes); `Annotated[X, check]` also has to hold. A field with a default may be missing, none may be there besides.

    Args:
      where: the file, and the place in it, for messages.

    Raises:
      InputError: names the field, what was given and what is possible.
    """
    if not isinstance(raw, dict):
        raise InputError(f"{where} holds {_kind(raw)}; an object is needed")
    hints, required = _schema(cls)
    if unknown := [name for name in raw if name not in hints]:
        hint = nearest(unknown[0], hints)
        names = some([_shown(name) for name in unknown])
        raise InputError(f"{where}: {names} not known{hint}; possible: {', '.join(hints)}")
    if missing := [name for name in required if name not in raw]:
        raise InputError(f"{where}: {some(missing)} missing")
    return cls(**{name: _value(value, hints[name], where, name) for name, value in raw.items()})


@functools.cache
def _schema(cls: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(field -> annotation, the fields without a default)."""
    hints = typing.get_type_hints(cls, include_extras=True)
    if dataclasses.is_dataclass(cls):
        missing = dataclasses.MISSING
        fields = dataclasses.fields(cls)
        required = tuple(each.name for each in fields if each.default is missing and each.default_factory is missing)
        return {each.name: hints[each.name] for each in fields}, required
    return hints, tuple(name for name in cls._fields if name not in cls._field_defaults)


def _value(raw: Any, hint: Any, where: str, name: str) -> Any:
    """A value as its annotation has it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = _value(raw, arguments[0], where, name)
        for check in arguments[1:]:
            if not check.holds(value):
                raise _refusal(raw, check.possible, where, name)
        return value
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in arguments if kind is not type(None)]
        if raw is None and len(kinds) < len(arguments):
            return None
        if len(kinds) == 1:
            return _value(raw, kinds[0], where, name)
        return _plain(raw, hint, where, name)
    if origin is tuple:
        if not isinstance(raw, list):
            raise _refusal(raw, "a list", where, name)
        return tuple(_value(each, arguments[0], where, f"{name}[{place}]") for place, each in enumerate(raw))
    if origin in (dict, Mapping):
        if not isinstance(raw, dict):
            raise _refusal(raw, "an object", where, name)
        return {key: _value(each, arguments[1], where, f"{name}[{_shown(key)}]") for key, each in raw.items()}
    if dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"):
        return record(typing.cast(Any, hint), raw, f"{where}: {name}")
    return _plain(raw, hint, where, name)


def _plain(raw: Any, hint: Any, where: str, name: str) -> Any:
    if not fits(raw, hint):
        raise _refusal(raw, describe(hint), where, name)
    if isinstance(raw, int) and not INTS[0] <= raw <= INTS[1]:
        raise _refusal(raw, "a number of 64 bits", where, name)
    return raw


def _refusal(raw: Any, possible: str, where: str, name: str) -> InputError:
    return InputError(f"{where}: {name}={_shown(raw)} is not possible: it must be {possible}")


def _kind(content: Any) -> str:
    return f"a JSON {type(content).__name__}"


def _shown(value: Any, most: int = 80) -> str:
    """A value in a message of one line, whatever it is."""
    text = repr(value) if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= most else f"{text[:most]}..."


# --- a checksum inside ---


def signed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an object and their checksum, to be written."""
    as_read = json.loads(json.dumps(fields))  # lists for tuples, texts for names
    return {**fields, CHECKSUM: fingerprint_values(as_read)}


def checked(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields that `signed` was given. An object without a checksum, of an earlier version, is taken as it is.

    Raises:
      InputError: the fields are not those that the checksum is of.
    """
    fields = {name: value for name, value in raw.items() if name != CHECKSUM}
    if CHECKSUM in raw and raw[CHECKSUM] != fingerprint_values(fields):
        changed = f"was changed since it was written, its {CHECKSUM} is another: restore it, or make it again"
        raise InputError(f"{where}: {changed} (after a change by hand, remove its {CHECKSUM})")
    return fields
