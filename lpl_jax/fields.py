"""A field of a configuration states its default, its meaning and its check once; what reads configs takes all three.

    @dataclasses.dataclass(frozen=True)
    class EMAConfig(Part, section="ema"):
        '''Moving averages of the parameters.'''

        start: int = field(0, "until this step the averages equal the parameters", whole(0, 10**9))

Types are checked too: int, float, bool, str, Literal, tuple[X, ...], and unions of them. In an optional field
(X | None) an empty text and "None" are None; a field at `TO_BE_GIVEN` has to be given before the part can be built.

A number has a finite range, which its check says, and is never NaN; ranges that several fields and flags share are in
`limits`. A text is a line that a path or name may be.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Union

from lpl_jax.errors import InputError, nearest, shown
from lpl_jax.redaction import refuse_credentials

TO_BE_GIVEN = "???"


LONGEST_TEXT = 4096  # characters, as of a path
MOST_MEMBERS = 1000  # of a tuple


class Check(NamedTuple):
    """Whether a value is possible, and the words for what is: "it must be {possible}".

    holds: of NaN it is False.
    """

    holds: Callable[[Any], bool]
    possible: str


def whole(low: int, high: int) -> Check:
    """A whole number from low to high."""
    return Check(lambda value: low <= value <= high, f"{low:,} to {high:,}")


def above(bound: float, high: float, *, or_infinite: bool = False) -> Check:
    """A number above the bound, up to high; or_infinite: or inf."""

    def holds(value):
        return bound < value <= high or (or_infinite and value == math.inf)

    return Check(holds, f"above {bound:g}, up to {high:g}{', or inf' if or_infinite else ''}")


def between(low: float, high: float, *, ends: Literal["both", "low", "none"] = "both") -> Check:
    """A number from low to high; `ends` says which of the two themselves are possible."""

    def holds(value):
        return (low <= value if ends != "none" else low < value) and (value <= high if ends == "both" else value < high)

    brackets = {"both": "[{:.7g}, {:.7g}]", "low": "[{:.7g}, {:.7g})", "none": "({:.7g}, {:.7g})"}[ends]
    return Check(holds, "in " + brackets.format(low, high))


def each(check: Check, most: int) -> Check:
    """A tuple of at most so many members, of which each is checked."""
    return Check(
        lambda value: len(value) <= most and all(map(check.holds, value)), f"up to {most}, each {check.possible}"
    )


def word_or(check: Check, *words: str) -> Check:
    """One of these words, or a whole number that is checked."""
    return Check(
        lambda value: value in words or (type(value) is int and check.holds(value)),
        f"{', '.join(words)}, or {check.possible}",
    )


def one_of(*values: Any) -> Check:
    """One of these values, where a Literal cannot list them."""
    return Check(lambda value: value in values, f"one of {', '.join(map(str, values))}")


def field(default: Any, help: str, check: Check | None = None, *, derived: str | None = None) -> Any:
    """A dataclass field with its default (`dataclasses.MISSING`: it has none), its meaning and its check.

    check: of a value that is not None and has the field's type.
    derived: what decides the value (such as "the autoencoder"): then no flag does.
    """
    return dataclasses.field(default=default, metadata={"help": help, "check": check, "derived": derived})


class Part:
    """A typed part of a config. A subclass is a frozen dataclass whose fields are made with `field`.

    section: the name of the part in a config, for messages.
    """

    section: ClassVar[str]

    def __init_subclass__(cls, section: str | None = None, **options):
        super().__init_subclass__(**options)
        if section is not None:
            cls.section = section

    def __post_init__(self):
        for item in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            given = getattr(self, item.name)
            value = normalised(given, hints(type(self))[item.name])
            if value is not given:
                object.__setattr__(self, item.name, value)
            self._check_field(item, value)
        self.check()

    def check(self) -> None:
        """What concerns several fields. Raises InputError; a subclass with such rules has its own."""

    def _check_field(self, item: dataclasses.Field, value: Any) -> None:
        hint, check = hints(type(self))[item.name], item.metadata.get("check")
        if isinstance(value, str):
            refuse_credentials(value, self._name(item))
        if value == TO_BE_GIVEN:
            raise InputError(f"{self._name(item)} has to be given: {item.metadata['help']}")
        if fits(value, hint) and (value is None or check is None or check.holds(value)):
            _check_text(self._name(item), value)
            return
        possible = describe(hint)
        if check is not None:
            possible = check.possible if fits(value, hint) else f"{possible} ({check.possible})"
        raise InputError(f"{self._name(item)}={shown(value)} is not possible: it must be {possible}")

    def _name(self, item: dataclasses.Field) -> str:
        return f"{self.section}.{item.name}" if self.section else item.name


def _check_text(name: str, value: Any) -> None:
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and not is_line(text):
            raise InputError(
                f"{name}={shown(text)} is not possible: it must be a line of 1 to {LONGEST_TEXT:,} characters"
            )


def is_line(text: str) -> bool:
    """Whether a text may be a name or path: neither empty nor endless, and without control characters."""
    return 0 < len(text) <= LONGEST_TEXT and all(each >= " " and each != "\x7f" for each in text)


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The types of a class's fields."""
    return typing.get_type_hints(cls)


def members(hint: Any) -> tuple[Any, ...]:
    """The types of a union; a single type is a union of one."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_numeric(hint: Any) -> bool:
    """Whether a number, or a tuple of them, is of this type."""
    kinds = [kind for kind in members(hint) if kind is not type(None)]
    return any(
        {int, float} & {kind, *(typing.get_args(kind) if typing.get_origin(kind) is tuple else ())} for kind in kinds
    )


def normalised(value: Any, hint: Any) -> Any:
    """The value as the field holds it: lists are tuples, empty optional texts None, numbers that came as text ints."""
    kinds = members(hint)
    if value in ("", "None") and isinstance(value, str) and type(None) in kinds:
        return None
    if isinstance(value, list) and any(typing.get_origin(kind) is tuple for kind in kinds):
        return tuple(value)
    if (
        isinstance(value, str)
        and value.isdecimal()
        and int in kinds
        and any(kind is str or typing.get_origin(kind) is Literal for kind in kinds)
    ):
        return int(value)
    return value


def fits(value: Any, hint: Any) -> bool:
    """Whether the value has the type. A bool is no number; an int is a float; a tuple has an end."""
    for kind in members(hint):
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any:
            return True
        if origin is Literal:
            # An int equals a bool, and a list is never one of them.
            found = any(type(value) is type(possible) and value == possible for possible in arguments)
        elif origin is tuple:
            found = (
                isinstance(value, tuple)
                and len(value) <= MOST_MEMBERS
                and all(fits(member, arguments[0]) for member in value)
            )
        elif kind in (int, float):
            found = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        else:
            found = isinstance(value, kind)
        if found:
            return True
    return False


def describe(hint: Any) -> str:
    """The type in words."""
    words: dict[Any, str] = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    words[type(None)] = "None"
    numbers: dict[Any, str] = {float: "numbers", int: "whole numbers"}

    def word(kind: Any) -> str:
        if typing.get_origin(kind) is Literal:
            return f"one of {', '.join(map(str, typing.get_args(kind)))}"
        if typing.get_origin(kind) is tuple:
            return numbers.get(typing.get_args(kind)[0], "several texts")
        return words.get(kind) or str(kind.__name__)

    return " or ".join(word(kind) for kind in members(hint))


def check_names(given: Iterable[str], possible: Sequence[str], template: str) -> None:
    """Raises InputError for the first name that is not possible, with the nearest one that is. template: "lpl.{}"."""
    for name in given:
        if name not in possible:
            raise InputError(
                f"{template.format(name)} is not known{nearest(name, possible)}; possible: {', '.join(possible)}"
            )
