"""From a ConfigDict to typed, frozen dataclasses: the one place that reads configs.

A config has one section for each part (`lpl config` and docs/config.md say what every field means). Each part checks
itself; what concerns two parts is checked here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from typing_extensions import override

from lpl_jax.autoencoders import AutoencoderConfig, TinyAutoencoderConfig
from lpl_jax.denoisers import MMDiTConfig, preset
from lpl_jax.denoisers.attention import check_attention, choose_attention, current_platform
from lpl_jax.diffusion import Paradigm, paradigm
from lpl_jax.errors import InputError
from lpl_jax.experiment.data import AutoencoderSource, DataConfig
from lpl_jax.experiment.evaluation import EvaluationConfig
from lpl_jax.experiment.loss import LossConfig
from lpl_jax.experiment.sampling import SamplingConfig
from lpl_jax.experiment.sections import SCALARS, SECTIONS
from lpl_jax.experiment.training import CheckpointConfig, EMAConfig, OptimizerConfig, TrainConfig, ema_name
from lpl_jax.fields import Part, check_names, field
from lpl_jax.limits import BATCH_PIXELS
from lpl_jax.losses import ComparisonConfig, LPLConfig
from lpl_jax.parallel import MeshConfig
from lpl_jax.text import TextConfig, TextSource

CLIP_L_WIDTH = 768
FEW = 0.25  # share of timesteps under which a gate is remarked upon


@dataclasses.dataclass(frozen=True)
class Experiment(Part, section=""):
    """A checked config: everything that a run depends on."""

    seed: int = field(*SCALARS["seed"])
    resolution: int = field(*SCALARS["resolution"])
    data: DataConfig = field(DataConfig(), "")
    autoencoder: AutoencoderSource = field(AutoencoderSource(), "")
    text: TextSource | None = field(None, "")
    model: MMDiTConfig = field(preset("tiny"), "")
    paradigm: Paradigm = field(paradigm("eps"), "")
    loss: LossConfig = field(LossConfig(), "")
    lpl: LPLConfig | None = field(None, "")
    comparison: ComparisonConfig | None = field(None, "")
    optimizer: OptimizerConfig = field(OptimizerConfig(), "")
    ema: EMAConfig = field(EMAConfig(), "")
    mesh: MeshConfig = field(MeshConfig(), "")
    train: TrainConfig = field(TrainConfig(), "")
    checkpoint: CheckpointConfig = field(CheckpointConfig(), "")
    sampling: SamplingConfig = field(SamplingConfig(), "")
    evaluation: EvaluationConfig = field(EvaluationConfig(), "")

    @override
    def check(self) -> None:
        _check_perceptual(self)
        _check_batch(self)
        self.sampling.check_for(self.paradigm)
        averages = ["params", *map(ema_name, self.ema.decays)]
        if self.sampling.weights is not None and self.sampling.weights not in averages:
            reason = f"with ema.decays={self.ema.decays}; possible: {', '.join(averages)}"
            raise InputError(f"sampling.weights={self.sampling.weights!r} {reason}")

    @property
    def gate_share(self) -> float | None:
        """Share of the timesteps that LPL, or a comparison loss, acts on; None without either."""
        part = self.lpl or self.comparison
        return None if part is None else self.paradigm.active_fraction(part.tau_at(self.resolution))


def build(config: ConfigDict | Mapping[str, Any], *, platform: str | None = None) -> Experiment:
    """The experiment that a config (a ConfigDict, or nested dicts) describes.

    platform: what it is for, cpu | tpu | cuda | rocm: decides every "auto". None: what this process computes on.

    Raises:
      InputError: an unknown section or field, a value that is not possible, or fields that contradict each other.
    """
    config = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    check_names(config, [*SCALARS, *SECTIONS], "config section {!r}")
    values = {section: dict(config.get(section) or {}) for section in SECTIONS}
    text = _text(_given(values["text"]))
    platform = platform or current_platform()
    special = {
        "autoencoder": _typed(AutoencoderSource, _computed(values["autoencoder"], platform)),
        "text": text,
        "model": _model(_given(values["model"]), text, platform),
        "paradigm": _paradigm(_given(values["paradigm"])),
        "lpl": _lpl(_given(values["lpl"])),
        "comparison": _comparison(_given(values["comparison"])),
    }
    simple = {name: _typed(SECTIONS[name].parts[0], values[name]) for name in SECTIONS if name not in special}
    return Experiment(**{name: config[name] for name in SCALARS if name in config}, **simple, **special)


def resolve(
    experiment: Experiment,
    autoencoder: AutoencoderConfig | TinyAutoencoderConfig,
    tower: TextConfig | None = None,
) -> Experiment:
    """The experiment with what only the frozen networks know: the number of latent channels, the width of text tokens.

    tower: of a run on text; None leaves these widths as they are.

    Raises:
      InputError: a resolution that the autoencoder does not take, patches that do not tile the latents, or taps that
        its decoder does not have.
    """
    model = dataclasses.replace(experiment.model, latent_channels=autoencoder.latent_channels)
    if tower is not None and experiment.text is not None:
        context_dim, pooled_dim = experiment.text.dims(tower)
        model = dataclasses.replace(model, context_dim=context_dim, pooled_dim=pooled_dim)
    side, rest = divmod(experiment.resolution, autoencoder.downsample)
    if rest:
        raise InputError(
            f"resolution={experiment.resolution} is not divisible by {autoencoder.downsample}, the downsampling factor "
            f"of autoencoder {autoencoder.name}"
        )
    model.grid(side, side)
    if experiment.lpl is not None:
        experiment.lpl.tap_names(autoencoder.tap_names)
    return dataclasses.replace(experiment, model=model)


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """Nested dicts of plain values, which `build` turns into the same experiment again."""
    result = dataclasses.asdict(experiment)
    result["paradigm"] = {"name": experiment.paradigm.name, **result["paradigm"]}
    result["lpl"] = {"preset": "none"} if experiment.lpl is None else {"preset": "fields", **result["lpl"]}
    if experiment.comparison is None:
        result["comparison"] = {"kind": "none"}
    if experiment.text is None:
        result["text"] = {"source": None}
    result["model"] = {"preset": "fields", **result["model"]}
    return result


def narrow_gate(experiment: Experiment) -> str | None:
    """A line that says so where the gate lets few timesteps through at the size that is trained; else None."""
    share, section = experiment.gate_share, "comparison" if experiment.lpl is None else "lpl"
    part = experiment.lpl or experiment.comparison
    if share is None or part is None or share >= FEW:
        return None
    tau, stated = f"{section}.tau={part.tau:g}", part.tau_ref_resolution
    text = f"the gate lets {100 * share:.0f} % of the timesteps through: {tau} for {stated} px is "
    text += f"{part.tau_at(experiment.resolution):.3g} at {experiment.resolution} px. "
    return f"{text}{section}.tau, or {section}.tau_ref_resolution={experiment.resolution}, changes that"


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is not left to a preset or kind."""
    return {name: value for name, value in values.items() if value not in (None, "", "None")}


def _typed(cls: type[Any], values: Mapping[str, Any]) -> Any:
    check_names(values, [item.name for item in dataclasses.fields(cls)], cls.section + ".{}")
    return cls(**values)


def _text(values: dict[str, Any]) -> TextSource | None:
    """None where no source is named: the others' defaults then have no use."""
    return _typed(TextSource, values) if "source" in values else None


def _model(values: dict[str, Any], text: TextSource | None, platform: str) -> MMDiTConfig:
    name = values.pop("preset", "tiny")
    if text is None and values.get("context_dim"):
        raise InputError(f"model.context_dim={values['context_dim']} is not possible: it must be 0 without text.source")
    if text is not None:
        if classes := values.get("num_classes", 0):
            raise InputError(
                f"model.num_classes={classes} is not possible with text.source: leave it out, as prompts stand in its "
                "place"
            )
        # Until `resolve` knows the tower: the widths of CLIP ViT-L/14.
        values = {"context_dim": CLIP_L_WIDTH, "pooled_dim": CLIP_L_WIDTH * text.pooled, **values, "num_classes": 0}
    automatic = values.get("attention") == "auto"
    values = {name: value for name, value in values.items() if name != "attention" or not automatic}
    values = _computed(values, platform)
    model = _typed(MMDiTConfig, values) if name == "fields" else preset(name, **values)
    given = platform, model.head_dim, model.dtype
    if automatic:
        return dataclasses.replace(model, attention=choose_attention(*given))
    check_attention(model.attention, *given)
    return model


def _computed(values: Mapping[str, Any], platform: str) -> dict[str, Any]:
    """With the compute type that "auto" is on this platform."""
    automatic = {"dtype": "float32" if platform == "cpu" else "bfloat16"} if values.get("dtype") == "auto" else {}
    return {**values, **automatic}


def _paradigm(values: dict[str, Any]) -> Paradigm:
    return paradigm(values.pop("name", "eps"), **values)


def _lpl(values: dict[str, Any]) -> LPLConfig | None:
    name = values.pop("preset", "none")
    if name == "none":
        if values:
            raise InputError(f"lpl.{next(iter(values))} is given, but lpl.preset is 'none': use 'paper' or 'reference'")
        return None
    return _typed(LPLConfig, values) if name == "fields" else LPLConfig.preset(name, **values)


def _comparison(values: dict[str, Any]) -> ComparisonConfig | None:
    if values.get("kind", "none") == "none":
        if given := [name for name in values if name != "kind"]:
            raise InputError(f"comparison.{given[0]} is given, but comparison.kind is 'none'")
        return None
    return _typed(ComparisonConfig, values)


def _check_perceptual(experiment: Experiment) -> None:
    lpl, comparison = experiment.lpl, experiment.comparison
    if lpl is not None and lpl.tau is None:
        raise InputError("lpl.tau is not set: give lpl.tau and lpl.tau_ref_resolution")
    if lpl is not None and lpl.weight is None and lpl.target_share is None:
        raise InputError("the perceptual loss has no weight: give lpl.weight or lpl.target_share")
    if (source := experiment.train.weight_from) is not None and (lpl is None or lpl.weight is not None):
        reason = "there is no LPL (lpl.preset)" if lpl is None else f"lpl.weight={lpl.weight} is given: leave one out"
        raise InputError(f"train.weight_from={source}: {reason}")
    begins, steps = experiment.loss.lpl_start, experiment.train.steps
    if begins and lpl is None and comparison is None:
        raise InputError(f"loss.lpl_start={begins} is given, but there is no LPL and no comparison loss to begin")
    if begins and begins >= steps:
        raise InputError(f"loss.lpl_start={begins} is not possible: it must be less than train.steps={steps}")
    if comparison is None:
        return
    if (comparison.kind == "reweighting") != (lpl is not None):
        needed = "needs the LPL whose variance it takes: give lpl.preset"
        needed = needed if lpl is None else "stands in place of LPL: use lpl.preset 'none'"
        raise InputError(f"comparison.kind={comparison.kind!r} {needed}")
    if comparison.block and comparison.block > experiment.model.depth:
        raise InputError(f"comparison.block={comparison.block} of a model with {experiment.model.depth} blocks")


def _check_batch(experiment: Experiment) -> None:
    """Whether the images to decode, and the groups that they are drawn from, fit the parts of a batch."""
    batch, parts = experiment.train.batch_size, experiment.train.accumulate
    capacity, groups = experiment.loss.lpl_capacity, experiment.loss.lpl_groups
    if isinstance(capacity, int) and capacity > batch:
        raise InputError(f"loss.lpl_capacity={capacity} is more than train.batch_size={batch}")
    if isinstance(capacity, int) and capacity % parts:
        raise InputError(
            f"loss.lpl_capacity={capacity} is not divisible by train.accumulate={parts}: each part decodes as many"
        )
    for name, images in (("train.batch_size", batch), ("evaluation.batch_size", experiment.evaluation.batch_size)):
        if (pixels := images * experiment.resolution**2) > BATCH_PIXELS:
            raise InputError(
                f"{name}={images} at resolution={experiment.resolution} are {pixels:.1e} pixels; possible are up to "
                f"{BATCH_PIXELS:.1e} in a batch"
            )
    if isinstance(groups, int) and batch // parts % groups:
        part = f"train.batch_size={batch} / train.accumulate={parts}"
        raise InputError(f"loss.lpl_groups={groups} does not divide {part}")
