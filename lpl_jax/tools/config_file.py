"""A config file and its overrides on the command line, for `train.py`, `eval.py` and the tools.

--config configs/imagenet.py:256,lpl --config.train.steps=1000 --config.data.source=/data/imagenet/train
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from lpl_jax.errors import InputError


def parse(argv: Sequence[str], define=None, default: ConfigDict | None = None) -> tuple[ConfigDict, flags.FlagValues]:
    """The ConfigDict that `--config FILE[:ARGUMENTS]` and `--config.section.field=value` describe, and all flags.

    Args:
      argv: arguments without the program's name.
      define: adds the program's own flags to a FlagValues.
      default: the config where no --config is given; overrides then change this one.
    Raises:
      InputError: no config, a file that cannot be loaded, an unknown flag or field, or a value of the wrong type.
    """
    values = flags.FlagValues()
    arguments = ["program", *argv]
    if define is not None:
        define(values)
    flags.DEFINE_boolean("debug", False, "show the traceback of an error", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this help", flag_values=values, short_name="h")
    try:
        if default is not None and _spec(argv) is None:
            config_flags.DEFINE_config_dict("config", default, flag_values=values, sys_argv=arguments)
        else:
            config_flags.DEFINE_config_file(
                "config", None, "config file, with arguments behind a colon", flag_values=values, sys_argv=arguments
            )
        rest = values(arguments)[1:]
        config = values.config
    except InputError:
        raise
    except flags.UnrecognizedFlagError as error:
        raise InputError(f"unknown flag --{error.flagname}; possible: {_flag_names(values)}") from error
    except (AttributeError, KeyError) as error:
        raise InputError(_unknown_field(argv, error, default)) from error
    except Exception as error:  # a config file is a program: it may fail in any way
        raise InputError(_reason(error, _spec(argv))) from error
    if values.help:
        return config, values
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; possible: {_flag_names(values)}")
    if config is None:
        raise InputError("no config given: --config FILE, such as --config configs/quickstart.py")
    if not isinstance(config, ConfigDict):  # a stand-in that fails once it is read, with the loader's report
        raise InputError(f"config file {_spec(argv)}: {_load_error(config)}")
    return config, values


def load(spec: str) -> ConfigDict:
    """The config of one `FILE[:ARGUMENTS]`. Raises InputError as `parse` does."""
    return parse([f"--config={spec}"])[0]


def _flag_names(values: flags.FlagValues) -> str:
    return ", ".join(f"--{name}" for name in sorted(values) if not name.startswith("config") and len(name) > 1) + (
        ", --config, --config.SECTION.FIELD=VALUE"
    )


def _unknown_field(argv: Sequence[str], error: Exception, default: ConfigDict | None) -> str:
    """Which override names a field that the config does not have, and the fields it could have meant."""
    spec = _spec(argv)
    if spec is None and default is None:
        return f"unknown field in an override: {error}"
    config = default if spec is None else load(spec)
    for arg in argv:
        flag = arg.split("=")[0].lstrip("-")
        if not flag.startswith("config."):
            continue
        here, path = config, "config"
        for part in flag.split(".")[1:]:
            if not isinstance(here, ConfigDict) or part not in here:
                fields = ", ".join(here) if isinstance(here, ConfigDict) else "none, it is a value"
                return f"{path} has no field {part!r}; possible: {fields}"
            here, path = here[part] if here.get_type(part) is not None else None, f"{path}.{part}"
    return f"config file {spec}: {error}"


def _spec(argv: Sequence[str]) -> str | None:
    """What follows --config."""
    for index, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name.lstrip("-") == "config":
            return value if equals else argv[index + 1]
    return None


def _load_error(config) -> str:
    try:
        config.to_dict()
    except OSError as error:
        return str(error).strip().splitlines()[-1].strip()
    except AttributeError:
        pass
    return f"get_config returns {type(config).__name__}, not a ConfigDict"


def _reason(error: Exception, spec: str | None) -> str:
    """One line for a value of the wrong type, or for what went wrong while a config file was run."""
    root = error
    while root.__cause__ is not None or root.__context__ is not None:
        root = root.__cause__ or root.__context__
    if isinstance(root, InputError):
        return str(root)
    if str(error).startswith("flag --config.") and "\n" not in str(error):
        return str(error)
    return f"config file {spec} fails: {type(root).__name__}: {root}"
