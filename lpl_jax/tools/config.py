"""Print every field of a config with its default and meaning; or a config, with all the values that it has.

    lpl config
    lpl config --config imagenet:512,post,lpl --config.train.batch_size=64

Configs of the package: quickstart, imagenet, cc12m, paper (a row of its tables), base (what the others change).
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from lpl_jax.experiment import config_dict, documentation
from lpl_jax.tools import cli, config_file, flags


def parser() -> cli.Parser:
    """The flags of `lpl config`."""
    result = cli.Parser(__doc__, prog="lpl config")
    flags.add_config(result)
    return result


def main(argv: Sequence[str]) -> int:
    """Arguments after the verb -> exit status."""
    args = parser().parse_args(argv)
    explained = args.config is None and not args.overrides
    print(documentation() if explained else values(config_file.given(args, config_dict())), end="")
    return 0


def values(config: ConfigDict) -> str:
    """A line for each field, with its value."""
    lines = []
    for section, content in config.items():
        if isinstance(content, ConfigDict):
            lines += [f"{section}.{name} = {value!r}" for name, value in content.items()]
        else:
            lines.append(f"{section} = {content!r}")
    return "\n".join(lines) + "\n"
