"""What all command-line programs share: parsers in one style, and one line for a mistake of the user.

Flags are `--kebab-case`. A traceback is shown on demand only (`--debug`).
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from typing_extensions import override

from lpl_jax import compile_cache
from lpl_jax.errors import InputError, nearest

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
        required = "the following arguments are required: "
        if message.startswith(required):
            message = f"missing {message.removeprefix(required)}; {self.prog} --help shows all flags"
        raise InputError(re.sub("^argument (--[a-z-]+):", "\\1", message))


# --- types of flags ---


class Several:
    """Values with commas between them, each of a kind; or one of some words that stand alone."""

    def __init__(self, kind: Callable[[str], Any], words: Sequence[str] = ()):
        self.kind, self.words = kind, words

    def __call__(self, text: str) -> list[Any]:
        """The values that a text names."""
        return [text] if text in self.words else [self.kind(part) for part in text.split(",")]


def text(given: str) -> str:
    """Text that is not empty."""
    if not given:
        raise argparse.ArgumentTypeError("is empty")
    return given


def number(given: str) -> float:
    """A number."""
    try:
        return float(given)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given}: must be a number") from None


def whole(given: str) -> int:
    """A whole number."""
    try:
        return int(given)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given}: must be a whole number") from None


def positive(given: str) -> int:
    """A whole number of 1 or more."""
    if (value := whole(given)) < 1:
        raise argparse.ArgumentTypeError(f"{given}: must be 1 or more")
    return value


def not_negative(given: str) -> int:
    """A whole number of 0 or more."""
    if (value := whole(given)) < 0:
        raise argparse.ArgumentTypeError(f"{given}: must be 0 or more")
    return value


def one_of(choices: Iterable[str]) -> dict[str, Any]:
    """Options of `add_argument` for a flag with these values."""
    choices = list(choices)

    def choice(given: str) -> str:
        if given not in choices:
            raise argparse.ArgumentTypeError(f"{given} is not possible{answer(given, choices)}")
        return given

    return {"type": choice, "metavar": "|".join(choices)}


# --- running a program ---


def run_main(
    main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None, *, keep_programs: bool = True
) -> None:
    """Runs main(argv) and exits with its status; an InputError is one line on stderr and status 2.

    Args:
      main: takes the arguments without the program's name, returns an exit status (None is 0).
      argv: the arguments; None takes those of the process. With "--debug" among them errors keep their traceback.
      keep_programs: whether what main compiles is kept (`lpl_jax.compile_cache`); not where compiling is measured.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if keep_programs:
            compile_cache.enable()
        status = main(argv)
    except InputError as error:
        if "--debug" in argv:
            raise
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        status = 2
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except OSError as error:  # a folder that is a file, or that may not be written
        if "--debug" in argv:
            raise
        path = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{path}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt as interrupt:
        if "--debug" in argv:
            raise
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from interrupt
    sys.exit(status)
