"""Print every field of a config with its default and meaning; or a config, with all the values that it has.

    lpl config
    lpl config --config imagenet:512,post,lpl --config.train.batch_size=64

Configs of the package: quickstart, imagenet, cc12m, paper (a row of its tables), base (what the others change).
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from lpl_jax.errors import InputError
from lpl_jax.experiment import build, config_dict, documentation
from lpl_jax.fields import TO_BE_GIVEN
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
    if explained:
        print(documentation(), end="")
        return 0
    config = config_file.given(args, config_dict())
    print(values(config) + gate(config), end="")
    return 0


def gate(config: ConfigDict) -> str:
    """A comment that says on which share of the timesteps LPL, or a comparison loss, acts; empty without either."""
    found = config.to_dict()
    for section in found.values():
        if isinstance(section, dict):  # what is still to be given says nothing of the gate
            section.update({name: None for name, value in section.items() if value == TO_BE_GIVEN})
    try:
        share = build(found).gate_share
    except InputError:  # `lpl train` says what is wrong
        return ""
    return "" if share is None else f"# the perceptual loss acts on {100 * share:.0f} % of the timesteps\n"


def values(config: ConfigDict) -> str:
    """A line for each field, with its value."""
    lines = []
    for section, content in config.items():
        if isinstance(content, ConfigDict):
            lines += [f"{section}.{name} = {value!r}" for name, value in content.items()]
        else:
            lines.append(f"{section} = {content!r}")
    return "\n".join(lines) + "\n"
