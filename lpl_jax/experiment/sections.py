"""The sections of a config as a table: the ConfigDict of all defaults, and the documentation of every field.

Most sections are one `Part`. Four are chosen by name (a preset of the model or of LPL, a paradigm, a comparison loss):
there a field at None takes the value of what was chosen.
"""

import dataclasses
import functools
import textwrap
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from lpl_jax.denoisers import PRESETS, MMDiTConfig
from lpl_jax.diffusion import PARADIGMS
from lpl_jax.experiment.data import AutoencoderSource, DataConfig
from lpl_jax.experiment.evaluation import EvaluationConfig
from lpl_jax.experiment.loss import LossConfig
from lpl_jax.experiment.sampling import SamplingConfig
from lpl_jax.experiment.training import CheckpointConfig, EMAConfig, OptimizerConfig, TrainConfig
from lpl_jax.fields import Check, describe, hints, is_numeric, members
from lpl_jax.limits import SEED, SIDE
from lpl_jax.losses import ComparisonConfig, LPLConfig
from lpl_jax.parallel import MeshConfig
from lpl_jax.text import TextSource

WIDTH = 120
SCALARS = {
    "seed": (0, "every random number of a run follows from it", SEED),
    "resolution": (256, "side of the images, pixels", SIDE),
}


class Chooser(NamedTuple):
    """The field that names a preset or a kind: its name, its default (None: a placeholder) and what it may be."""

    name: str
    default: str | None
    help: str


class Section(NamedTuple):
    """A section of a config.

    parts: its dataclasses, of which the chooser takes one. automatic: fields that a config leaves to the machine, with
    what "auto" does.
    """

    parts: tuple[type[Any], ...]
    chooser: Chooser | None = None
    automatic: Mapping[str, str] = {}


SECTIONS: dict[str, Section] = {
    "data": Section((DataConfig,)),
    "autoencoder": Section(
        (AutoencoderSource,),
        automatic={"dtype": "compute type: float32 | bfloat16 | auto (bfloat16 on accelerators; stores are float32)"},
    ),
    "text": Section((TextSource,), Chooser("source", None, "")),
    "model": Section(
        (MMDiTConfig,),
        Chooser("preset", "tiny", " | ".join(PRESETS)),
        {
            "attention": "xla | cudnn (NVIDIA GPUs) | splash (TPUs) | auto (the platform's own, else xla)",
            "dtype": "compute type: float32 | bfloat16 | auto (bfloat16 on accelerators)",
        },
    ),
    "paradigm": Section(tuple(PARADIGMS.values()), Chooser("name", "eps", "eps | v (zero terminal SNR) | flow")),
    "loss": Section((LossConfig,)),
    "lpl": Section(
        (LPLConfig,),
        Chooser("preset", "none", "none (diffusion loss alone) | paper | reference (the public PyTorch example)"),
    ),
    "comparison": Section(
        (ComparisonConfig,),
        Chooser("kind", "none", "none | latent_lpips | self_perceptual | reweighting (Eq. 15; lpl says of which LPL)"),
    ),
    "optimizer": Section((OptimizerConfig,)),
    "ema": Section((EMAConfig,)),
    "mesh": Section((MeshConfig,)),
    "train": Section((TrainConfig,)),
    "checkpoint": Section((CheckpointConfig,)),
    "sampling": Section((SamplingConfig,)),
    "evaluation": Section((EvaluationConfig,)),
}


class Entry(NamedTuple):
    """A field of a config as a user sees it.

    value: in a fresh config. hint: its type. help: its meaning. check: of what is given. defaults: where it is None, by
    what was chosen.
    """

    value: Any
    hint: Any
    help: str
    check: Check | None = None
    defaults: Mapping[str, Any] = {}


@functools.cache
def entries(section: str) -> Mapping[str, Entry]:
    """All fields of a section that can be given, by name, in order."""
    parts, chooser, automatic = SECTIONS[section]
    result = {}
    if chooser is not None and chooser.help:
        result[chooser.name] = Entry(chooser.default, str, chooser.help)
    for part in parts:
        for item in dataclasses.fields(part):
            if item.name in result or item.metadata["derived"] is not None:
                continue
            hint, text, value = hints(part)[item.name], item.metadata["help"], item.default
            check = item.metadata["check"]
            if item.name in automatic:
                result[item.name] = Entry("auto", str, automatic[item.name])
            elif section == "text":  # all other defaults are of use only where the source, which has none, is given
                missing = value is dataclasses.MISSING
                result[item.name] = Entry(None if missing else value, hint | None if missing else hint, text, check)
            elif chooser is not None:
                result[item.name] = Entry(None, hint | None, text, check, _defaults(section, item.name))
            else:
                result[item.name] = Entry(value, hint, text, check)
    return result


def _defaults(section: str, name: str) -> dict[str, Any]:
    """The default of a field by what was chosen."""
    if section == "lpl":
        return {preset: getattr(LPLConfig.preset(preset), name) for preset in ("paper", "reference")}
    if section == "paradigm":
        return {kind: getattr(part(), name) for kind, part in PARADIGMS.items() if name in hints(part)}
    if section == "model":
        return {preset: getattr(config, name) for preset, config in PRESETS.items()}
    return {}


def config_dict() -> ConfigDict:
    """A ConfigDict of all fields with their defaults.

    What may be None is a reference with the field's type, and so is a number that may also be a word.
    """
    result = ConfigDict({name: value for name, (value, *_) in SCALARS.items()})
    for section in SECTIONS:
        result[section] = fields = ConfigDict()
        for name, entry in entries(section).items():
            free = entry.value is None or is_optional(section, name)
            kind = _plain(entry.hint)
            free |= kind is object and isinstance(entry.value, int)
            fields[name] = FieldReference(entry.value, field_type=kind) if free else entry.value
    return result


def is_optional(section: str, name: str) -> bool:
    """Whether the field can be None."""
    return section in SECTIONS and name in entries(section) and type(None) in members(entries(section)[name].hint)


def _plain(hint: Any) -> type:
    """The type of a placeholder: what the values of a field are parsed as."""
    kinds = [kind for kind in members(hint) if kind is not type(None)]
    if len(kinds) > 1:
        return object
    if typing.get_origin(kinds[0]) is typing.Literal:
        return str
    return kinds[0] if kinds[0] in (int, float, bool, str) else object


def documentation() -> str:
    """Every field with its type, default and meaning, as Markdown: docs/config.md."""
    blocks = [
        "# Every field of a config",
        _wrapped(
            "Printed by `lpl config`. A field is set in a config file (`c.train.steps = 1000`) or on the command line "
            "(`--config.train.steps=1000`). In an optional field `None`, or nothing, means None."
        ),
        "\n".join(_item(name, _kind(int, check), _code(value), text) for name, (value, text, check) in SCALARS.items()),
    ]
    for section, (parts, *_) in SECTIONS.items():
        first = parts[0]
        about = str((first.__mro__[1] if len(parts) > 1 else first).__doc__).splitlines()[0]
        lines = []
        for name, entry in entries(section).items():
            default = _code(entry.value) + _defaults_text(entry.defaults)
            lines.append(_item(f"{section}.{name}", _kind(entry.hint, entry.check), default, entry.help))
        blocks += [f"## {section}", _wrapped(about), "\n".join(lines)]
    return "\n\n".join(blocks) + "\n"


def _defaults_text(defaults: Mapping[str, Any]) -> str:
    values = list(defaults.values())
    if not values or (len(values) > 1 and all(value == values[0] for value in values) and values[0] is None):
        return ""
    if all(value == values[0] for value in values):
        return f": {_code(values[0])}"
    return ": " + ", ".join(f"{name} {_code(value)}" for name, value in defaults.items())


def _kind(hint: Any, check: Check | None) -> str:
    """The type in words, of a number with its range; alternatives of words are listed by the help."""
    kinds = [kind for kind in members(hint) if kind is not type(None)]
    if check is not None and is_numeric(hint):
        kind = f"{describe(kinds[0]).removeprefix('a ')}, " if len(kinds) == 1 else ""
        return f"{kind}{check.possible}; "
    listed = any(typing.get_origin(kind) is typing.Literal for kind in kinds)
    return "" if listed else f"{' or '.join(describe(kind) for kind in kinds).removeprefix('a ')}; "


def _code(value: Any) -> str:
    return f"`{value}`"


def _item(name: str, kind: str, default: str, text: str) -> str:
    return textwrap.fill(f"- `{name}` ({kind}{default}): {text}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)
