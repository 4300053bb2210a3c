"""Config files and what a command line changes in them.

    --config imagenet:256,lpl --config.train.steps=1000

A name is looked for in the working directory first, then in the package: `imagenet`, `imagenet.py` and
`configs/imagenet.py` are the same. After a colon come arguments of the file's `get_config`.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from lpl_jax.errors import InputError
from lpl_jax.io.paths import to_path
from lpl_jax.tools.cli import OVERRIDE, answer

PACKAGE = Path(__file__).resolve().parents[1] / "configs"
HELPERS = ("__init__", "recipe")  # of the package's configs, none themselves
NOTHING = ("", "None")
WORDS = {int: "a whole number", float: "a number", bool: "True or False"}


def given(args: argparse.Namespace, default: ConfigDict | None = None) -> ConfigDict:
    """The config of a command line: `args.config` (or the default, which is changed) with `args.overrides`.

    Raises InputError: no config, or what `load` and `override` raise.
    """
    if args.config is not None:
        return load(args.config, args.overrides)
    if default is None:
        raise InputError("no config given: --config FILE, such as --config quickstart")
    return override(default, args.overrides)


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of one `FILE[:ARGUMENTS]`, with the fields of `--config.SECTION.FIELD=VALUE` changed.

    Raises InputError: a file that is not there, or fails, or an override that is not possible.
    """
    if "://" in spec:
        raise InputError(f"--config {spec} is remote; it takes local files only")
    name, colon, arguments = spec.partition(":")
    file = module(name)
    if not callable(getattr(file, "get_config", None)):
        raise InputError(f"config file {name} has no function get_config")
    try:
        config = file.get_config(arguments) if colon else file.get_config()
    except InputError:
        raise
    except Exception as error:  # a config file is a program: it may fail in any way
        raise InputError(f"config file {spec} fails: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"config file {spec}: get_config returns {type(config).__name__}, not a ConfigDict")
    return override(config, overrides)


def module(name: str) -> ModuleType:
    """A config file as a module. Raises InputError: it is not there, or fails."""
    path = find(name)
    loader = SourceFileLoader(f"lpl_config_{path.stem}", str(path))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    found = module_from_spec(spec)
    sys.modules[loader.name] = found  # dataclasses look their module up
    try:
        loader.exec_module(found)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"config file {name} fails: {type(error).__name__}: {error}") from error
    return found


def find(name: str) -> Path:
    """The file of a config: as given or with .py, here, in configs/ or in the package. Raises InputError."""
    path, short = to_path(name, "--config"), name.removeprefix("configs/")
    folders = () if path.is_absolute() else (Path("configs"), PACKAGE)
    for candidate in (path, *(folder / short for folder in folders)):
        for path in (candidate, candidate.with_name(f"{candidate.name}.py")):
            if path.is_file():
                return path
    known = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in HELPERS)
    raise InputError(f"config file {name}: no such file{answer(path.stem, known)}")


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Changes the fields that `--config.SECTION.FIELD=VALUE` name, the last one of a field counts; returns the config.

    A hyphen in a name is an underscore, as in other flags.
    None and an empty value are None where a field may be unset, which a placeholder says.
    Raises InputError: an unknown section or field, or a value that it cannot have.
    """
    config.lock()
    values: dict[str, list[str]] = {}  # by field: parts of a tuple may come one by one
    for each in overrides:
        path, _, value = each.removeprefix(OVERRIDE).partition("=")
        values.setdefault(path.replace("-", "_"), []).append(value)
    for path, texts in values.items():
        holder, field = _find(config, path)
        if texts[-1] not in NOTHING:
            _set(holder, field, path, [text for text in texts if text not in NOTHING])
        elif _may_be_unset(holder, field):
            holder[field] = None
        else:
            needed = f"it needs a value, such as {holder[field]!r}"
            raise InputError(f"config.{path}={texts[-1]} is not possible: {needed}")
    return config


def _find(config: ConfigDict, path: str) -> tuple[ConfigDict, str]:
    """The section of a field, and its name there. Raises InputError where there is none."""
    here, name, section = config, "config", config
    *sections, field = path.split(".")
    for part in [*sections, field]:
        if not isinstance(here, ConfigDict):
            raise InputError(f"{name} is a value, it has no field {part!r}")
        section = here
        if part not in here:
            raise InputError(f"{name} has no field {part!r}{_answer(config, here, part, field)}")
        here, name = here[part], f"{name}.{part}"
    if isinstance(here, ConfigDict):
        raise InputError(f"{name} is a section: give {name}.FIELD=VALUE, FIELD one of {', '.join(here)}")
    return section, field


def _answer(config: ConfigDict, section: ConfigDict, part: str, field: str) -> str:
    """What may be meant by a part that a section does not have: a field of this name elsewhere, or a name like it."""
    elsewhere = [name for name in _fields(config) if name.rpartition(".")[2] == field]
    return f" (did you mean {' or '.join(elsewhere)}?)" if elsewhere and part == field else answer(part, section)


def _fields(config: ConfigDict, section: str = "config") -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{section}.{name}")
        else:
            yield f"{section}.{name}"


def _may_be_unset(section: ConfigDict, field: str) -> bool:
    value = dict(section.items(preserve_field_references=True))[field]
    return value is None or isinstance(value, FieldReference)


def _set(section: ConfigDict, field: str, path: str, texts: Sequence[str]) -> None:
    """Gives a field of a section the value that these texts mean for its type. path: of the field, for messages."""
    kind = section.get_type(field)
    argv, values = ["lpl", *(f"{OVERRIDE}{field}={text}" for text in texts)], flags.FlagValues()
    try:  # with the section alone: each call writes out all that it is given, as YAML
        config_flags.DEFINE_config_dict("config", section, flag_values=values, sys_argv=argv)
        values(argv)
    except Exception as error:  # of many kinds, by the type of the field
        needed = WORDS.get(kind, f"of type {kind.__name__}")
        raise InputError(f"config.{path}={texts[-1]} is not possible: it must be {needed}") from error
