"""From a ConfigDict to typed, frozen dataclasses: the one place that reads configs.

A config has one section for each part (see `configs/base.py`, which documents every field). A field left at None takes
the part's own default, or its preset's. Each part checks itself; what concerns two parts is checked here.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lpl_jax.autoencoders import AutoencoderConfig
from lpl_jax.denoisers import MMDiTConfig, preset
from lpl_jax.denoisers.attention import check_attention, choose_attention, current_platform
from lpl_jax.diffusion import LOSS_WEIGHTS, Paradigm, paradigm, rescaled_guidance
from lpl_jax.errors import InputError
from lpl_jax.experiment.evaluation import EvaluationConfig
from lpl_jax.experiment.optimizer import OptimizerConfig
from lpl_jax.losses import ComparisonConfig, LPLConfig
from lpl_jax.parallel import MeshConfig
from lpl_jax.text import TextConfig, TextSource

# Share of a batch that the economical setting decodes. With five taps of Stable Diffusion's decoder a step of paper796
# then takes about 1.2 times the operations of one without LPL, at 256 and at 512 px (docs/flops.md).
ECONOMICAL_SHARE = 1 / 12

CLIP_L_WIDTH = 768


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where latents come from: a store, which is prepared from an image source first if it does not exist."""

    source: str = "photos"
    store: str | None = None
    crop: str | None = None
    crops: int | None = None
    split: str | None = None
    data_dir: str | None = None
    caption_key: str | None = None
    second_caption_key: str | None = None
    limit: int | None = None
    unfinished: bool = False

    def __post_init__(self):
        if self.second_caption_key is not None and self.caption_key is None:
            raise InputError(f"data.second_caption_key={self.second_caption_key}: give data.caption_key, the first one")

    @property
    def captions(self) -> tuple[str, ...] | None:
        """Caption columns; None leaves them to the source."""
        return tuple(key for key in (self.caption_key, self.second_caption_key) if key is not None) or None


@dataclasses.dataclass(frozen=True)
class AutoencoderSource:
    """What `lpl_jax.autoencoders.load` takes."""

    source: str = "bundled"
    subfolder: str | None = None
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The diffusion loss, and how the perceptual loss enters a step."""

    weighting: str = "none"
    gamma: float = 5.0
    label_dropout: float = 0.1
    lpl_capacity: str | int = "auto"
    lpl_groups: str | int = "auto"
    lpl_chunk: str | int = "auto"
    stratified_t: bool = False
    calibration_batches: int = 50
    lpl_start: int = 0

    def __post_init__(self):
        _require(self.weighting in LOSS_WEIGHTS, "loss.weighting", self.weighting, f"one of {', '.join(LOSS_WEIGHTS)}")
        _require(0 <= self.label_dropout <= 1, "loss.label_dropout", self.label_dropout, "a probability, 0 to 1")
        _require(self.lpl_start >= 0, "loss.lpl_start", self.lpl_start, "a step, 0 or more")
        _require(self.calibration_batches > 0, "loss.calibration_batches", self.calibration_batches, "1 or more")
        for name, words, possible in (
            (
                "lpl_capacity",
                ("auto", "economical", "all"),
                "auto, economical, all, or a number of images of each batch",
            ),
            ("lpl_groups", ("auto",), "auto, or a number of groups of each batch"),
            ("lpl_chunk", ("auto",), "auto, or a number of images"),
        ):
            if str(getattr(self, name)).isdecimal():  # a number on the command line arrives as text
                object.__setattr__(self, name, int(getattr(self, name)))
            value = getattr(self, name)
            _require(value in words or type(value) is int and value > 0, f"loss.{name}", value, possible)

    def groups(self, shards: int) -> int:
        """Groups that decoded images are drawn from: as given, or the parts that devices split a batch into."""
        return shards if self.lpl_groups == "auto" else self.lpl_groups

    @property
    def chunk(self) -> int | None:
        """Images that a device decodes at a time; None: by their size."""
        return None if self.lpl_chunk == "auto" else self.lpl_chunk

    def capacity(self, batch_size: int, active_fraction: float, groups: int, parts: int = 1) -> int | None:
        """Images that a step decodes, or None for all of a batch; with several parts of a batch, that one of them does.

        "auto": 1.1 times the expected number under the threshold, rounded up to equal parts of the groups.
        "economical": `ECONOMICAL_SHARE` of the batch, rounded down to equal parts, but at least one of each group.
        """
        batch_size //= parts
        if self.lpl_capacity == "all":
            return None
        if self.lpl_capacity == "auto":
            wanted = math.ceil(max(1, math.ceil(1.1 * active_fraction * batch_size)) / groups)
        elif self.lpl_capacity == "economical":
            wanted = max(1, int(ECONOMICAL_SHARE * batch_size / groups))
        else:
            return self.lpl_capacity // parts
        return min(batch_size, wanted * groups)


@dataclasses.dataclass(frozen=True)
class EMAConfig:
    """Moving averages of the parameters, side by side."""

    decays: tuple[float, ...] = (0.9999,)
    start: int = 0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of a run, what it starts from and what it leaves behind."""

    batch_size: int = 256
    accumulate: int = 1
    steps: int = 100_000
    log_every: int = 50
    checkpoint_every: int = 5000
    keep: int = 3
    keep_every: int | None = None
    init_from: str | None = None
    init_weights: str = "params"

    def __post_init__(self):
        for name in ("batch_size", "accumulate", "steps", "log_every", "checkpoint_every", "keep"):
            _require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "1 or more")
        if self.init_from == "":
            raise InputError("post-training starts from another run: give train.init_from, the folder of that run")
        whole = f"a divisor of train.batch_size={self.batch_size}"
        _require(self.batch_size % self.accumulate == 0, "train.accumulate", self.accumulate, whole)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How images are generated. `sampler` None is the paradigm's first one (ddim, or euler).

    guidance is taken as it is, or, with `guidance_resolution`, as stated for images of that side.
    """

    sampler: str | None = None
    steps: int = 50
    guidance: float = 1.5
    guidance_resolution: int | None = None
    spacing: str = "trailing"
    per_class: int = 2
    weights: str | None = None

    def __post_init__(self):
        side = self.guidance_resolution
        _require(side is None or side > 0, "sampling.guidance_resolution", side, "a number of pixels")

    def guidance_at(self, resolution: int) -> float:
        """The guidance scale for images of this side."""
        if self.guidance_resolution is None:
            return self.guidance
        return rescaled_guidance(self.guidance, resolution / self.guidance_resolution)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked config: everything that a run depends on."""

    seed: int
    resolution: int
    data: DataConfig
    autoencoder: AutoencoderSource
    text: TextSource | None
    model: MMDiTConfig
    paradigm: Paradigm
    loss: LossConfig
    lpl: LPLConfig | None
    comparison: ComparisonConfig | None
    optimizer: OptimizerConfig
    ema: EMAConfig
    mesh: MeshConfig
    train: TrainConfig
    sampling: SamplingConfig
    evaluation: EvaluationConfig


def build(config: Mapping[str, Any], *, platform: str | None = None) -> Experiment:
    """The experiment that a config (a ConfigDict, or nested dicts) describes.

    platform: what it is for, cpu | tpu | cuda | rocm: decides every "auto". None: what this process computes on.
    Raises:
      InputError: an unknown section or field, a value that is not possible, or fields that contradict each other.
    """
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    known = [field.name for field in dataclasses.fields(Experiment)]
    for name in config:
        _require(name in known, "config section", name, f"one of {', '.join(known)}")
    seed, resolution = config.get("seed", 0), config.get("resolution")
    _require(isinstance(seed, int) and seed >= 0, "seed", seed, "0 or a positive integer")
    _require(isinstance(resolution, int) and resolution > 0, "resolution", resolution, "a number of pixels")
    text = _text(_given(config, "text"))
    experiment = Experiment(
        seed=seed,
        resolution=resolution,
        data=_typed(DataConfig, config, "data"),
        autoencoder=_typed(AutoencoderSource, config, "autoencoder"),
        text=text,
        model=_model(_given(config, "model"), text, platform or current_platform()),
        paradigm=_paradigm(_given(config, "paradigm")),
        loss=_typed(LossConfig, config, "loss"),
        lpl=_lpl(_given(config, "lpl")),
        comparison=_comparison(_given(config, "comparison")),
        optimizer=_typed(OptimizerConfig, config, "optimizer"),
        ema=_typed(EMAConfig, config, "ema"),
        mesh=_typed(MeshConfig, config, "mesh"),
        train=_typed(TrainConfig, config, "train"),
        sampling=_typed(SamplingConfig, config, "sampling"),
        evaluation=_typed(EvaluationConfig, config, "evaluation"),
    )
    _check_together(experiment)
    return experiment


def resolve(experiment: Experiment, autoencoder: AutoencoderConfig, tower: TextConfig | None = None) -> Experiment:
    """The experiment with what only the frozen networks know: the number of latent channels, the width of text tokens.

    tower: of a run on text; None leaves these widths as they are.

    Raises:
      InputError: a resolution that the autoencoder does not take, or patches that do not tile the latents.
    """
    model = dataclasses.replace(experiment.model, latent_channels=autoencoder.latent_channels)
    if tower is not None:
        context_dim, pooled_dim = experiment.text.dims(tower)
        model = dataclasses.replace(model, context_dim=context_dim, pooled_dim=pooled_dim)
    side, rest = divmod(experiment.resolution, autoencoder.downsample)
    if rest:
        raise InputError(
            f"resolution={experiment.resolution} is not divisible by {autoencoder.downsample}, the downsampling factor "
            f"of autoencoder {autoencoder.name}"
        )
    model.grid(side, side)
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


def _given(config: Mapping[str, Any], section: str) -> dict[str, Any]:
    return {name: value for name, value in (config.get(section) or {}).items() if value is not None}


def _typed(cls, config: Mapping[str, Any], section: str):
    values = _given(config, section)
    known = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        _require(name in known, f"field of {section}", name, f"one of {', '.join(known)}")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _text(values: dict[str, Any]) -> TextSource | None:
    """None where no source is named: the others' defaults then have no use."""
    return _typed(TextSource, {"text": values}, "text") if "source" in values else None


def _model(values: dict[str, Any], text: TextSource | None, platform: str) -> MMDiTConfig:
    name = values.pop("preset", "tiny")
    if text is None:
        _require(not values.get("context_dim"), "model.context_dim", values.get("context_dim"), "0 without text.source")
    else:
        classes = values.get("num_classes", 0)
        _require(not classes, "model.num_classes", classes, "left out with text.source: prompts stand in its place")
        # Until `resolve` knows the tower: the widths of CLIP ViT-L/14.
        values = {"context_dim": CLIP_L_WIDTH, "pooled_dim": CLIP_L_WIDTH * text.pooled, **values, "num_classes": 0}
    automatic = values.get("attention") == "auto"
    values = {field: value for field, value in values.items() if field != "attention" or not automatic}
    if values.get("dtype") == "auto":
        values["dtype"] = "float32" if platform == "cpu" else "bfloat16"
    model = _typed(MMDiTConfig, {"model": values}, "model") if name == "fields" else preset(name, **values)
    given = platform, model.head_dim, model.dtype
    if automatic:
        return dataclasses.replace(model, attention=choose_attention(*given))
    check_attention(model.attention, *given)
    return model


def _paradigm(values: dict[str, Any]) -> Paradigm:
    return paradigm(values.pop("name", "eps"), **values)


def _lpl(values: dict[str, Any]) -> LPLConfig | None:
    name = values.pop("preset", "none")
    if name == "none":
        if values:
            raise InputError(f"lpl.{next(iter(values))} is given, but lpl.preset is 'none': use 'paper' or 'reference'")
        return None
    return _typed(LPLConfig, {"lpl": values}, "lpl") if name == "fields" else LPLConfig.preset(name, **values)


def _comparison(values: dict[str, Any]) -> ComparisonConfig | None:
    if values.get("kind", "none") == "none":
        if given := [name for name in values if name != "kind"]:
            raise InputError(f"comparison.{given[0]} is given, but comparison.kind is 'none'")
        return None
    return _typed(ComparisonConfig, {"comparison": values}, "comparison")


def _check_together(experiment: Experiment) -> None:
    batch, lpl, capacity = experiment.train.batch_size, experiment.lpl, experiment.loss.lpl_capacity
    if isinstance(capacity, int) and capacity > batch:
        raise InputError(f"loss.lpl_capacity={capacity} is more than train.batch_size={batch}")
    parts = experiment.train.accumulate
    if isinstance(capacity, int) and capacity % parts:
        raise InputError(
            f"loss.lpl_capacity={capacity} is not divisible by train.accumulate={parts}: each part decodes as many"
        )
    groups = experiment.loss.lpl_groups
    if isinstance(groups, int) and batch // parts % groups:
        whole = f"train.batch_size={batch} / train.accumulate={parts}"
        raise InputError(f"loss.lpl_groups={groups} does not divide {whole}")
    if lpl is not None and lpl.tau is None:
        raise InputError("lpl.tau is not set: give lpl.tau and lpl.tau_ref_resolution")
    if lpl is not None and lpl.weight is None and lpl.target_share is None:
        raise InputError("the perceptual loss has no weight: give lpl.weight or lpl.target_share")
    comparison = experiment.comparison
    if comparison is not None and (comparison.kind == "reweighting") != (lpl is not None):
        needed = "needs the LPL whose variance it takes: give lpl.preset"
        needed = needed if lpl is None else "stands in place of LPL: use lpl.preset 'none'"
        raise InputError(f"comparison.kind={comparison.kind!r} {needed}")
    if comparison is not None and comparison.block and comparison.block > experiment.model.depth:
        raise InputError(f"comparison.block={comparison.block} of a model with {experiment.model.depth} blocks")
    sampler, possible = experiment.sampling.sampler, experiment.paradigm.samplers
    if sampler is not None and sampler not in possible:
        name = experiment.paradigm.name
        raise InputError(f"sampling.sampler={sampler!r} with paradigm {name!r}; possible: {', '.join(possible)}")


def _require(holds: bool, name: str, value: Any, possible: str) -> None:
    if not holds:
        raise InputError(f"{name}={value!r} is not possible: it must be {possible}")
