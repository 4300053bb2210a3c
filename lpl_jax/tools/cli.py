"""What all command-line programs share: parsers in one style, and one line for a mistake of the user.

Flags are `--kebab-case`. Whatever goes wrong in a verb, or in a thread of it, is one line here. A traceback is shown on
demand only (`--debug`, or LPL_DEBUG=1).
"""

import argparse
import contextlib
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from typing_extensions import override

from lpl_jax import fields, stopping
from lpl_jax.errors import InputError, nearest, short, shown
from lpl_jax.fields import LONGEST_TEXT, Check, is_line
from lpl_jax.io import faults

OVERRIDE = "--config."  # of the flags that change a field of a config
_FLAG = re.compile(r"--?[A-Za-z][\w.-]*")  # what has a space in it is a value, as for argparse


def answer(name: str, possible: Iterable[str]) -> str:
    """The end of a message on a name that is not known: the nearest that is, else all that are."""
    possible = list(possible)
    return nearest(name, possible) or f"; possible: {', '.join(possible)}"


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        """With the default; where that depends on something else, the help itself says what it is."""
        default = action.default
        plain = default is None or default is False or default is argparse.SUPPRESS or action.required
        return action.help if plain else f"{action.help} (default: {str(default).replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """A parser with defaults in its help and the flag --debug; a mistake is an InputError.

    A flag or verb that it does not know is answered by the nearest one. `overrides`, if it is switched on, takes
    `--config.SECTION.FIELD=VALUE` and returns them in the attribute `overrides` of the result.
    """

    def __init__(self, description: str | None = None, **options):
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False, **options)
        self.overrides = False
        self.verbs = None
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def add_subparsers(self, **options):
        """As of argparse; a verb has to be given."""
        self.verbs = super().add_subparsers(required=True, metavar="VERB", **options)
        return self.verbs

    @override
    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]  # overloads
        """As of argparse, which calls it for each verb with the arguments after it."""
        arguments = sys.argv[1:] if args is None else list(args)
        self._check_names(arguments)
        if not self.overrides:
            return super().parse_known_args(arguments, namespace)
        given = [argument for argument in arguments if argument.startswith(OVERRIDE)]
        found, rest = super().parse_known_args([each for each in arguments if each not in given], namespace)
        found.overrides = given
        return found, rest

    def _check_names(self, arguments: Sequence[str]) -> None:
        """Before argparse looks: it would rather say which flags are missing."""
        known = self._option_string_actions
        for argument in arguments:
            name, equals, _ = argument.partition("=")
            if argument == "--":
                return
            if not _FLAG.fullmatch(name):
                if self.verbs is None:
                    continue
                if argument not in self.verbs.choices:
                    raise InputError(f"{self.prog} has no verb {argument!r}{answer(argument, self.verbs.choices)}")
                return  # what follows is for the verb
            if self.overrides and name.startswith(OVERRIDE):
                if not equals:
                    raise InputError(f"{name} has no value: {name}=VALUE")
            elif name not in known:
                flags = [flag for flag in known if flag.startswith("--")]
                raise InputError(f"unknown flag {name}{answer('--' + name.lstrip('-'), flags)}")

    def error(self, message: str):
        """Raises InputError, for all that argparse finds wrong."""
        unknown = "unrecognized arguments: "
        if message.startswith(unknown) and "--config" in self._option_string_actions:
            message += f" (did you mean --config {message.removeprefix(unknown).split()[0]}?)"
        required = "the following arguments are required: "
        if message.startswith(required):
            message = f"missing {message.removeprefix(required)}; {self.prog} --help shows all flags"
        raise InputError(re.sub("^argument (--[a-z-]+):", "\\1", message))


# --- types of flags ---


MOST_VALUES = 1000  # of a flag that takes several


class Several:
    """Values with commas between them, each of a kind; or one of some words that stand alone."""

    def __init__(self, kind: Callable[[str], Any], words: Sequence[str] = ()):
        self.kind, self.words = kind, words

    def __call__(self, given: str) -> list[Any]:
        """The values that a text names."""
        if given in self.words:
            return [given]
        if (count := given.count(",") + 1) > MOST_VALUES:
            raise argparse.ArgumentTypeError(f"has {count:,} values: at most {MOST_VALUES:,} are possible")
        return [self.kind(part) for part in given.split(",")]


def text(given: str) -> str:
    """Text that is neither empty nor endless, on one line."""
    if not given:
        raise argparse.ArgumentTypeError("is empty")
    if not is_line(given):
        raise argparse.ArgumentTypeError(f"{shown(given)}: must be a line of at most {LONGEST_TEXT:,} characters")
    return given


class Number:
    """A number in a range; read: float, or int for a whole one."""

    def __init__(self, check: Check, read: Callable[[str], Any] = float):
        self.check, self.read = check, read

    def __call__(self, given: str) -> float:
        """The number that a text is."""
        try:
            value = self.read(given)
        except ValueError:
            name = "whole number" if self.read is int else "number"
            raise argparse.ArgumentTypeError(f"{short(given)}: must be a {name} ({self.check.possible})") from None
        if not self.check.holds(value):
            raise argparse.ArgumentTypeError(f"{short(given)}: must be {self.check.possible}")
        return value


def count(check: Check) -> Number:
    """A whole number that is checked."""
    return Number(check, int)


def whole(low: int, high: int) -> Number:
    """A whole number from low to high."""
    return count(fields.whole(low, high))


def one_of(choices: Iterable[str]) -> dict[str, Any]:
    """Options of `add_argument` for a flag with these values."""
    choices = list(choices)

    def choice(given: str) -> str:
        if given not in choices:
            raise argparse.ArgumentTypeError(f"{short(given)} is not possible{answer(given, choices)}")
        return given

    return {"type": choice, "metavar": "|".join(choices)}


# --- running a program ---


DEBUG = "LPL_DEBUG"


def debugging(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> bool:
    """Whether errors are shown with their traceback: asked for by a flag, or by the environment."""
    return "--debug" in argv or environment.get(DEBUG, "") not in ("", "0")


def run_main(
    main: Callable[[Sequence[str]], int | None],
    argv: Sequence[str] | None = None,
    *,
    keep_programs: bool = True,
    lower: str = "",
) -> None:
    """Runs main(argv) and exits with its status; any error is a line on stderr and status 2, or 1 for a fault of ours.

    Args:
      main: takes the arguments without the program's name, returns an exit status (None is 0).
      argv: the arguments; None takes those of the process. With "--debug" among them, or LPL_DEBUG=1 in the
        environment, errors keep their traceback.
      keep_programs: whether what main compiles is kept (`lpl_jax.compile_cache`); not where compiling is measured.
      lower: what takes less memory, for messages.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    debug = debugging(argv)
    try:
        with stopping.unwinding(), contextlib.nullcontext([]) if debug else _quiet_threads() as failed:
            if keep_programs:
                from lpl_jax import compile_cache  # here, as it imports what takes long: see `lpl_jax.stopping`

                compile_cache.enable()
            status = main(argv)
        if failed and not status:
            raise failed[0]
    except KeyboardInterrupt as interrupt:
        stopping.say()
        raise SystemExit(stopping.STATUS) from interrupt
    except Exception as error:
        if stopping.stopped():  # what was interrupted may say so by an error of its own
            stopping.say()
            raise SystemExit(stopping.STATUS) from error
        if debug:
            raise
        if isinstance(error, BrokenPipeError):  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        text, status = faults.explain(error, lower=lower)
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(status) from error
    sys.exit(status)


@contextlib.contextmanager
def _quiet_threads() -> Iterator[list[BaseException]]:
    """Threads in the background print nothing of their own: what ended one is in the list that is given.

    Mostly the main thread raises it, too, and that is said once. Orbax logs what it raises, so its logger is silent.
    """
    failed: list[BaseException] = []
    before = threading.excepthook, sys.unraisablehook, logging.getLogger("absl").level
    threading.excepthook = lambda args: failed.append(args.exc_value) if args.exc_value else None
    sys.unraisablehook = lambda _: None
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        yield failed
    finally:
        threading.excepthook, sys.unraisablehook, level = before
        logging.getLogger("absl").setLevel(level)
