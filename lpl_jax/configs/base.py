"""The config of all defaults, which other configs start from; docs/config.md has every field and its meaning.

    lpl train --config base --workdir runs/mine --config.train.steps=1000

A field at None takes the default of its part or of the named preset; give it a value to change that. The same file
describes one CPU and a TPU pod: sizes are global, and the mesh says how they are split.
"""

from ml_collections import ConfigDict

from lpl_jax.errors import InputError, nearest
from lpl_jax.experiment import config_dict


def choose(file: str, arguments: str, possible: tuple[str, ...]) -> set[str]:
    """The comma-separated arguments of a config file, each one of `possible`."""
    chosen = {word for word in arguments.split(",") if word}
    if unknown := sorted(chosen - set(possible)):
        raise InputError(
            f"{file} does not take {', '.join(unknown)!r}{nearest(unknown[0], possible)}; "
            f"possible: {', '.join(possible) or 'nothing'}"
        )
    return chosen


def one_of(file: str, chosen: set[str], alternatives: tuple[str, ...]) -> str:
    """The one of the alternatives that was chosen; the first where none was."""
    found = [word for word in alternatives if word in chosen]
    if len(found) > 1:
        raise InputError(f"{file} takes one of {', '.join(alternatives)}, got {' and '.join(found)}")
    return (found or alternatives)[0]


def get_config(arguments: str = "") -> ConfigDict:
    """arguments: none are taken here."""
    choose("configs/base.py", arguments, ())
    return config_dict()
