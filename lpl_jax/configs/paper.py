"""Every row of the paper's tables and every curve of its figures that is a training run, by name (docs/paper.md).

    lpl train --config paper:table3_flow_lpl --workdir runs/paper/table3_flow_lpl \
        --config.train.init_from=runs/paper/pretrain_flow --config.data.store=/data/latents512

`lpl sweep` runs several of them, evaluates them and sets the paper's numbers beside ours. A row
starts from `configs/imagenet.py` or `configs/cc12m.py` with some arguments and changes fields; docs/decisions.md says
what was chosen where the paper is silent.
"""

import dataclasses
from typing import Any

from lpl_jax.configs import base, cc12m, imagenet, recipe
from lpl_jax.errors import InputError
from lpl_jax.fields import TO_BE_GIVEN

ASYMMETRIC = cc12m.AUTOENCODER  # the main results' (Sec. 4.1); ablations: SDXL's
# S320M is private: the recipe of CC12M, for 320 million captioned images of one's own.
DATASETS = {"imagenet": imagenet, "cc12m": cc12m, "s320m": cc12m}
SEPARATE = {"lpl.stats": "separate"}
TFLOP = "TFLOP a step and GPU"
VARIANT = "recalibrated_"  # the same row with a calibration of its own
DEFAULT_LPL = {"256": "figure15_lpl", "512": "table3_eps_lpl"}  # whose weight the rows of a sweep take
FIGURE21_START = 200_000  # step of the pre-training that Fig. 21 starts from


@dataclasses.dataclass(frozen=True)
class Row:
    """A named experiment.

    Attributes:
      name: the argument of this file.
      where: the table or figure, and which row or curve of it.
      arguments: of the data set's config file.
      changes: dotted field -> value.
      init: name of the row whose last checkpoint (or that of `train.init_step`) it starts from; None starts from
        scratch.
      weight: name of the row whose calibrated weight of LPL it takes; None calibrates its own.
      paper: metric -> the printed value.
      evaluate: lists for `lpl eval`, by flag; empty: the last checkpoint, with every average.
      dataset: one of `DATASETS`.
      against: name of the row that this one is compared with.
      gain: metric -> the printed change from the row `against`, where the values themselves are not printed.
      cost: unit -> the printed cost of a step or of the training.
      training_set: whether samples are compared with the training set, whatever reference the others have.
      place: in a figure over one quantity, that quantity and where on it the row is: ("tau", "3").
    """

    name: str
    where: str
    arguments: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    init: str | None = None
    paper: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluate: dict[str, str] = dataclasses.field(default_factory=dict)
    dataset: str = "imagenet"
    against: str | None = None
    gain: dict[str, float] = dataclasses.field(default_factory=dict)
    cost: dict[str, float] = dataclasses.field(default_factory=dict)
    training_set: bool = False
    place: tuple[str, str] | None = None
    weight: str | None = None

    @property
    def figure(self) -> str:
        """What its curve or picture is called: figure6 of figure6_tau1, recalibrated_figure6 of its variant."""
        return VARIANT * self.name.startswith(VARIANT) + self.name.removeprefix(VARIANT).split("_")[0]

    @property
    def autoencoder(self) -> str:
        default = "stabilityai/sdxl-vae" if self.dataset == "imagenet" else ASYMMETRIC
        return self.changes.get("autoencoder.source", default)


def _pretraining():
    for paradigm in ("eps", "v", "flow"):
        kept = {"train.keep_every": FIGURE21_START} if paradigm == "eps" else {}
        yield Row(f"pretrain_{paradigm}", f"pre-training, {paradigm} (Sec. 4.1)", f"256,{paradigm}", kept)
    yield Row("pretrain_asymmetric", "pre-training, eps (Table 2)", "256,eps", {"autoencoder.source": ASYMMETRIC})
    for dataset in ("cc12m", "s320m"):
        where = f"pre-training on {dataset.upper()}, eps (Table 2)"
        yield Row(f"pretrain_{dataset}", where, "256,eps", _source(dataset), dataset=dataset)


def _source(dataset):
    return {"data.source": "/data/s320m"} if dataset == "s320m" else {}


def _pair(
    prefix,
    where,
    arguments,
    changes=None,
    init=None,
    paper=({}, {}),
    *,
    gain=None,
    cost=({}, {}),
    more=None,
    weight=None,
    **fields,
):
    """The row without and with LPL. more, weight: of the one with LPL alone."""
    base, lpl = f"{prefix}_base", f"{prefix}_lpl"
    changes = changes or {}
    yield Row(base, f"{where}, without LPL", arguments, dict(changes), init, paper[0], cost=cost[0], **fields)
    compared = dict(against=base, gain=gain or {}, cost=cost[1], weight=weight)
    changes = {**changes, **(more or {})}
    yield Row(lpl, f"{where}, with LPL", arguments + ",lpl", changes, init, paper[1], **compared, **fields)


def _table2():
    source = {"autoencoder.source": ASYMMETRIC}
    values = ({"fid": 2.98}, {"fid": 2.72})
    init = "pretrain_asymmetric"
    yield from _pair("table2_imagenet256", "Table 2, ImageNet 256", "256,eps,post", source, init, values)
    gain = {"fid": -0.91}
    yield from _pair("table2_imagenet512", "Table 2, ImageNet 512", "512,eps,post", source, init, gain=gain)
    values = ({"fid": 7.81, "clip_score": 25.06}, {"fid": 6.22, "clip_score": 25.12})
    options = dict(init="pretrain_cc12m", dataset="cc12m")
    yield from _pair("table2_cc12m256", "Table 2, CC12M 256", "256,eps,post", paper=values, **options)
    gain = {"fid": -1.52, "clip_score": 0.24}
    yield from _pair("table2_cc12m512", "Table 2, CC12M 512", "512,eps,post", gain=gain, **options)
    spectra = {"evaluation.num_images": 10_000}
    yield from _pair("figure4", "Fig. 4 and 5, spectra, CC12M 512", "512,eps,post", spectra, **options)
    values = ({"fid": 8.81, "clip_score": 24.39}, {"fid": 8.30, "clip_score": 24.41})
    options = dict(init="pretrain_s320m", dataset="s320m", paper=values)
    yield from _pair("table2_s320m512", "Table 2, S320M 512", "512,eps,post", _source("s320m"), **options)


def _table3():
    names = ("fid", "coverage", "density", "precision", "recall")
    printed = {
        "eps": ((4.88, 0.80, 1.14, 0.74, 0.49), (3.79, 0.82, 1.13, 0.77, 0.51)),
        "v": ((4.72, 0.80, 1.15, 0.73, 0.49), (3.84, 0.83, 1.14, 0.78, 0.50)),
        "flow": ((4.54, 0.82, 1.14, 0.75, 0.52), (3.61, 0.85, 1.29, 0.79, 0.54)),
    }
    for paradigm, rows in printed.items():
        values = [dict(zip(names, row, strict=True)) for row in rows]
        init, arguments = f"pretrain_{paradigm}", f"512,{paradigm},post"
        yield from _pair(f"table3_{paradigm}", f"Table 3, {paradigm}", arguments, None, init, values)


def _table4():
    """Only differences between the two are printed; of coverage, precision and recall in percent points."""
    names = ("fid", "coverage", "density", "precision", "recall")
    printed = {
        ("0", 0): (-0.58, 0.0429, 0.14, 0.0401, 0.0199),
        ("50k", 50_000): (-0.78, 0.0351, 0.12, 0.0455, 0.0232),
        ("400k", 400_000): (-0.97, 0.0399, 0.21, 0.0589, 0.0422),
    }
    for (name, steps), values in printed.items():
        gain = dict(zip(names, values, strict=True))
        init = "pretrain_eps"
        weight = DEFAULT_LPL["512"] if steps else None
        if steps:
            init = f"table4_{name}_init"
            where = f"Table 4, {name} steps of post-training before"
            yield Row(init, where, "512,eps,post", {"train.steps": steps}, "pretrain_eps")
        fields = dict(gain=gain, weight=weight)
        yield from _pair(f"table4_{name}", f"Table 4, after {name} steps", "512,eps,post", None, init, **fields)


def _comparisons():
    def row(name, where, arguments, changes, fid, against="table5_l2"):
        arguments = f"512,eps,post{arguments}"
        return Row(name, where, arguments, changes, "pretrain_eps", {"fid": fid}, against=against)

    lpips = {"comparison.kind": "latent_lpips"}
    gated = lpips | {"comparison.tau": 3.0, "comparison.tau_ref_resolution": 512}
    blocks = {block: {"comparison.kind": "self_perceptual", "comparison.block": block} for block in (8, 16, 28)}
    kinds = (
        ("l2", "L2", "", {}, 4.88, 16.6, 42.5),
        ("latent_lpips", "E-LatentLPIPS", "", lpips, 7.71, 13.3, 67.5),
        ("latent_lpips_gated", "E-LatentLPIPS (dagger)", "", gated, 7.19, 15.8, 43.5),
        ("self_perceptual8", "Self-Perceptual, block 8", "", blocks[8], 5.82, 13.3, 70.6),
        ("self_perceptual16", "Self-Perceptual, block 16", "", blocks[16], 13.40, 11.4, 75.1),
        ("self_perceptual28", "Self-Perceptual, block 28", "", blocks[28], 10.43, 9.2, 82.4),
        ("lpl", "LPL", ",lpl", {}, 3.79, 9.6, 74.3),
    )
    for name, title, arguments, changes, fid, *_ in kinds:
        against = None if name == "l2" else "table5_l2"
        yield row(f"table5_{name}", f"Table 5, {title}", arguments, changes, fid, against)
    # Its FID column is that of the ablations, its costs are with the main results' autoencoder (App. A.4).
    for name, title, arguments, changes, _, speed, memory in kinds:
        cost = {"images/s": speed, "% of 80 GB": memory}
        heavy, where = changes | {"autoencoder.source": ASYMMETRIC}, f"Table 5, throughput and memory, {title}"
        arguments = f"512,eps,post{arguments}"
        yield Row(f"throughput_{name}", where, arguments, heavy, "pretrain_asymmetric", cost=cost)
    base = dict(against="table6_base")
    # A baseline, with the baseline's average: LPL is only measured.
    eq15 = {"comparison.kind": "reweighting", "sampling.weights": recipe.AVERAGES["none"]}
    min_snr = {"loss.weighting": "min_snr"}
    yield row("table6_base", "Table 6, baseline", "", {}, 4.88, against=None)
    yield row("table6_eq15", "Table 6, baseline (dagger), Eq. 15", ",lpl", eq15, 5.43, **base)
    yield row("table6_min_snr", "Table 6, min-SNR", "", min_snr, 5.04, **base)
    yield row("table6_lpl", "Table 6, LPL", ",lpl", {}, 3.79, **base)


def _table7():
    """48 hours on two nodes; the same number of GPUs with 25 and 16 images each.

    With LPL 5 of 16 images are decoded: the paper's operations are those of a share of 0.307.
    """
    changes = {"train.batch_size": 400, "train.steps": 122_500, "optimizer.learning_rate": 25 / 16 * 1e-4}
    lpl = {"train.batch_size": 256, "train.steps": 82_500, "optimizer.learning_rate": 1e-4, "loss.lpl_capacity": 80}
    values, cost = ({"fid": 4.62}, {"fid": 3.84}), ({TFLOP: 108.347}, {TFLOP: 106.581})
    where = "Table 7, 48 h on two nodes of 8 A100"
    yield from _pair("table7", where, "512,eps,post", changes, "pretrain_eps", values, cost=cost, more=lpl)


def _table8():
    """The trainings whose operations are printed: SD's autoencoder, embeddings of size and crop, on 16 GPUs."""
    printed = {
        "imagenet": (63.389, (63.389, 99.987), (69.342, 106.581)),
        "cc12m": (63.391, (63.391, 100.064), (69.342, 106.583)),
        "s320m": (63.391, None, (69.342, 106.583)),
    }
    title = {"imagenet": "ImageNet", "cc12m": "CC12M", "s320m": "S320M"}
    for dataset, (first, *others) in printed.items():
        changes = {"model.control": True, "autoencoder.source": "stabilityai/sdxl-vae", **_source(dataset)}
        init, where = f"table8_{dataset}_pretrain", f"Table 8, {title[dataset]}"
        yield Row(init, f"{where}, pre-training", "256,eps", dict(changes), cost={TFLOP: first}, dataset=dataset)
        for size, both in zip((256, 512), others, strict=True):
            if both:
                more = {"loss.lpl_capacity": {256: 320, 512: 80}[size]}  # 5 of 16, as in Table 7
                costs = [{TFLOP: value} for value in both]
                options = dict(cost=costs, more=more, dataset=dataset)
                name, arguments = f"table8_{dataset}{size}", f"{size},eps,post"
                yield from _pair(name, f"{where} {size}", arguments, changes, init, **options)


def _table9():
    """The baseline, without LPL, beside other papers' models (App. A.7)."""
    changes = {"sampling.steps": 250}
    for name, sampler, fid in (("eps", "ddim", 3.02), ("flow", "rk4", 2.49)):
        extra = changes | {"sampling.sampler": sampler}
        where, init = f"Table 9, {name}, 250 steps of {sampler}, against the training set", f"pretrain_{name}"
        yield Row(f"table9_{name}", where, f"512,{name},post", extra, init, {"fid": fid}, training_set=True)


def _ablations():
    """One thing is changed at a time: the weight is that of the default row, not calibrated anew."""
    held = DEFAULT_LPL["512"]

    def row(name, where, changes, arguments="512,eps,post,lpl", place=None, weight=held, **paper):
        lpl = arguments.endswith("lpl")
        options = dict(against="table5_l2" if lpl else None, weight=weight if lpl else None, place=place)
        return Row(name, where, arguments, changes, "pretrain_eps", paper, **options)

    for tau in (1.0, 2.0, 3.0, 4.5, 6.0, 10.0, 20.0, float("inf")):
        changes = {"lpl.tau": tau, "lpl.tau_ref_resolution": 512}
        yield row(f"figure6_tau{tau:g}", f"Fig. 6, tau = {tau:g}", changes, place=("tau at 512 px", f"{tau:g}"))
    blocks = "decoder blocks"
    yield row("figure7_taps0", "Fig. 7, no decoder blocks", {}, "512,eps,post", (blocks, "0"))
    for taps in (1, 2, 3, 4, 5):
        changes, where = {"lpl.taps": taps} if taps < 5 else {}, f"Fig. 7, {taps} decoder block{'s' * (taps > 1)}"
        yield row(f"figure7_taps{taps}", where, changes, place=(blocks, str(taps)))
    # An error of pixels has another unit than one of features.
    yield row("figure7_rgb", "Fig. 7, decoded images", {"lpl.taps": "rgb"}, place=(blocks, "rgb"), weight=None)
    for weight in (0.0, 0.3, 1.0, 3.0, 10.0, 30.0):
        arguments = "512,eps,post,lpl" if weight else "512,eps,post"
        changes, place = {"lpl.weight": weight} if weight else {}, ("weight of LPL", f"{weight:g}")
        yield row(f"figure9_weight{weight:g}", f"Fig. 9, weight {weight:g}", changes, arguments, place, weight=None)
    yield row("normalisation_separate", "Sec. 4.3, statistics of each map's own", SEPARATE, fid=4.79)
    yield row("normalisation_shared", "Sec. 4.3, shared statistics", {}, fid=3.79)
    yield row("statistics_without_gradient", "no gradient through the statistics", {"lpl.stats_grad": False})
    yield row("depth_uniform", "Sec. 4.3, equal depth weights", {"lpl.omega": "uniform"}, fid=4.38)
    yield row("depth_inverse", "Sec. 4.3, weights by depth", {}, fid=3.79)
    yield row("depth_literal", "depth weights as printed in Eq. 3", {"lpl.omega": "literal"})
    yield row("no_outlier_mask", "App. A.3, without outlier masks", {"lpl.mask_layers": "none"})
    yield row("mask_on_clean", "App. A.3, masks of the clean features", {"lpl.mask_on": "clean"})
    yield row("late_lpl", "LPL from step 50k on", {"loss.lpl_start": 50_000})


def _curves():
    decays = {"ema.decays": (0.999, 0.9995, 0.99975, 0.9999, 0.99995)}
    averages = {"weights": ",".join(map(repr, decays["ema.decays"]))}
    yield from _pair("figure10", "Fig. 10", "512,eps,post", decays, "pretrain_eps", evaluate=averages)
    kept = {"train.keep_every": 10_000, "train.checkpoint_every": 10_000}
    every = {"checkpoint": "all"}
    post = "256,eps,post"
    yield from _pair("figure15", "Fig. 15 and 17, post-training at 256", post, kept, "pretrain_eps", evaluate=every)
    # From the first step on: a network that has learned nothing is nothing to calibrate on.
    options = dict(evaluate=every, weight=DEFAULT_LPL["256"], more={"loss.lpl_start": 0})
    yield from _pair("figure14", "Fig. 14 and 16, from scratch at 256", "256,eps", kept, **options)
    average = kept | {"ema.start": 50_000}
    where = "Fig. 18, averages from 50k on"
    yield from _pair("figure18", where, post, average, "pretrain_eps", evaluate=every | {"weights": "params,0.9999"})
    steps = {"steps": "5,10,15,25,50,100,200"}
    yield from _pair("figure8", "Fig. 8, sampling steps", "512,eps,post", None, "pretrain_eps", evaluate=steps)
    guidance = {"guidance": "1,1.25,1.5,1.75,2,2.25,2.5,2.75,3"}
    yield Row("figure19", "Fig. 19, guidance", "512,eps,post", {}, "pretrain_eps", evaluate=guidance)
    for tau in (0.5, 1.0, 1.5, 3.0, 6.0):
        changes = {"lpl.tau": tau, "lpl.tau_ref_resolution": 256}
        place = ("tau at 256 px", f"{tau:g}")
        name, where = f"figure20_tau{tau:g}", f"Fig. 20, tau = {tau:g}"
        options = dict(place=place, against="figure15_base", weight=DEFAULT_LPL["256"])
        yield Row(name, where, f"{post},lpl", changes, "pretrain_eps", **options)
    plain = {"ema.decays": (), "sampling.weights": None, "sampling.guidance": 1.0, "train.steps": 100_000}
    plain |= {"train.init_step": FIGURE21_START}
    where = "Fig. 21, from step 200k of the pre-training, no guidance, no average"
    yield from _pair("figure21", where, post, plain, "pretrain_eps")


def _recalibrated():
    """The sweeps with the weight calibrated anew in each row, so that LPL is a fifth of the loss in all of them."""
    for part in (_ablations, _curves):
        for row in part():
            if row.weight is not None and row.init is not None:  # from scratch there is nothing to calibrate on
                where = f"{row.where}, weight of its own"
                yield dataclasses.replace(row, name=VARIANT + row.name, where=where, weight=None)


TABLES = (_table2, _table3, _table4, _comparisons, _table7, _table8, _table9)
PARTS = (_pretraining, *TABLES, _ablations, _curves, _recalibrated)
ROWS: dict[str, Row] = {row.name: row for part in PARTS for row in part()}


def get_config(arguments: str = ""):
    """arguments: the name of a row."""
    if not arguments:
        raise InputError("configs/paper.py needs the name of a row, such as configs/paper.py:table3_flow_lpl")
    name = base.one_of("configs/paper.py", base.choose("configs/paper.py", arguments, tuple(ROWS)), tuple(ROWS))
    row = ROWS[name]
    config = DATASETS[row.dataset].get_config(row.arguments)
    for field, value in row.changes.items():
        section, _, key = field.partition(".")
        with config.ignore_type():
            config[section][key] = value
    if row.init is not None:
        config.train.init_from = TO_BE_GIVEN  # the folder of row.init
    if row.weight is not None:
        config.train.weight_from = TO_BE_GIVEN  # that of row.weight
    return config
