"""What all command-line programs share: one line for a mistake of the user, a traceback only on demand."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from lpl_jax import compile_cache
from lpl_jax.errors import InputError


class _ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with defaults in its help and the flag --debug, which `run_main` looks for."""
    result = argparse.ArgumentParser(description=description, formatter_class=_ShowDefaults, allow_abbrev=False)
    result.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return result


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
    if keep_programs:
        compile_cache.enable()
    try:
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
        place = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{place}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        if "--debug" in argv:
            raise
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
