"""Every row of the paper's tables and every curve of its figures that is a training run, by name (docs/paper.md).

    python train.py --config configs/paper.py:table3_flow_lpl --workdir runs/paper/table3_flow_lpl \
        --config.train.init_from=runs/paper/pretrain_flow --config.data.store=/data/latents512

`python -m lpl_jax.tools.sweep` runs several of them, evaluates them and sets the paper's numbers beside ours. A row
starts from `configs/imagenet.py` or `configs/cc12m.py` with some arguments and changes fields; docs/decisions.md says
what was chosen where the paper is silent.
"""

import dataclasses
from typing import Any

from configs import base, cc12m, imagenet

ASYMMETRIC = cc12m.AUTOENCODER  # the main results' (Sec. 4.1); ablations: SDXL's
DATASETS = {"imagenet": imagenet, "cc12m": cc12m}
SEPARATE = {"lpl.stats": "separate"}


@dataclasses.dataclass(frozen=True)
class Row:
    """A named experiment.

    Attributes:
      name: the argument of this file.
      where: the table or figure, and which row or curve of it.
      arguments: of the data set's config file.
      changes: dotted field -> value.
      init: name of the row whose last checkpoint it starts from; None starts from scratch.
      paper: metric -> the printed value.
      evaluate: lists for eval.py, by flag; empty: the last checkpoint, once.
      caveat: in what our run differs from the paper's, beyond docs/decisions.md.
      dataset: one of `DATASETS`.
    """

    name: str
    where: str
    arguments: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    init: str | None = None
    paper: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluate: dict[str, str] = dataclasses.field(default_factory=dict)
    caveat: str = ""
    dataset: str = "imagenet"

    @property
    def autoencoder(self) -> str:
        default = {"imagenet": "stabilityai/sdxl-vae", "cc12m": ASYMMETRIC}[self.dataset]
        return self.changes.get("autoencoder.source", default)


def _pretraining():
    for paradigm in ("eps", "v", "flow"):
        yield Row(f"pretrain_{paradigm}", f"pre-training, {paradigm} (Sec. 4.1)", f"256,{paradigm}")
    yield Row("pretrain_asymmetric", "pre-training, eps (Table 2)", "256,eps", {"autoencoder.source": ASYMMETRIC})
    yield Row("pretrain_cc12m", "pre-training on CC12M, eps (Table 2)", "256,eps", dataset="cc12m")


def _pair(prefix, where, arguments, changes=None, init=None, paper=({}, {}), **fields):
    """The row without and with LPL."""
    for suffix, extra, values in (("base", "", paper[0]), ("lpl", ",lpl", paper[1])):
        title = f"{where}, {'with' if extra else 'without'} LPL"
        yield Row(f"{prefix}_{suffix}", title, arguments + extra, dict(changes or {}), init, values, **fields)


def _table2():
    source = {"autoencoder.source": ASYMMETRIC}
    values = ({"fid": 2.98}, {"fid": 2.72})
    init = "pretrain_asymmetric"
    yield from _pair("table2_imagenet256", "Table 2, ImageNet 256", "256,eps,post", source, init, values)
    yield from _pair("table2_imagenet512", "Table 2, ImageNet 512", "512,eps,post", source, init)
    values = ({"fid": 7.81, "clip_score": 25.06}, {"fid": 6.22, "clip_score": 25.12})
    options = dict(init="pretrain_cc12m", dataset="cc12m")
    yield from _pair("table2_cc12m256", "Table 2, CC12M 256", "256,eps,post", paper=values, **options)
    yield from _pair("table2_cc12m512", "Table 2, CC12M 512", "512,eps,post", **options)


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
    """Only differences between the two are printed: FID -0.58, -0.78, -0.97."""
    for name, steps in (("0", 0), ("50k", 50_000), ("400k", 400_000)):
        init = "pretrain_eps"
        if steps:
            init = f"table4_{name}_init"
            where = f"Table 4, {name} steps of post-training before"
            yield Row(init, where, "512,eps,post", {"train.steps": steps}, "pretrain_eps")
        yield from _pair(f"table4_{name}", f"Table 4, after {name} steps", "512,eps,post", None, init)


def _comparisons():
    def row(name, where, arguments, changes, **paper):
        return Row(name, where, f"512,eps,post{arguments}", changes, "pretrain_eps", paper)

    lpips = {"comparison.kind": "latent_lpips"}
    yield row("table5_l2", "Table 5, L2", "", {}, fid=4.88)
    yield row("table5_latent_lpips", "Table 5, E-LatentLPIPS", "", lpips, fid=7.71)
    gated = lpips | {"comparison.tau": 3.0, "comparison.tau_ref_resolution": 512}
    yield row("table5_latent_lpips_gated", "Table 5, E-LatentLPIPS (dagger)", "", gated, fid=7.19)
    for block, fid in ((8, 5.82), (16, 13.40), (28, 10.43)):
        changes = {"comparison.kind": "self_perceptual", "comparison.block": block}
        yield row(f"table5_self_perceptual{block}", f"Table 5, Self-Perceptual, block {block}", "", changes, fid=fid)
    yield row("table5_lpl", "Table 5, LPL", ",lpl", {}, fid=3.79)
    yield row("table6_base", "Table 6, baseline", "", {}, fid=4.88)
    yield row("table6_eq15", "Table 6, baseline (dagger), Eq. 15", ",lpl", {"comparison.kind": "reweighting"}, fid=5.43)
    yield row("table6_min_snr", "Table 6, min-SNR", "", {"loss.weighting": "min_snr"}, fid=5.04)
    yield row("table6_lpl", "Table 6, LPL", ",lpl", {}, fid=3.79)


def _table7():
    """48 hours on two nodes; the same number of GPUs with 25 and 16 images each."""
    base_changes = {"train.batch_size": 400, "train.steps": 122_500, "optimizer.learning_rate": 25 / 16 * 1e-4}
    rows = (("base", "", base_changes, 4.62), ("lpl", ",lpl", {"train.steps": 82_500}, 3.84))
    for name, extra, changes, fid in rows:
        where = f"Table 7, {'LPL' if extra else 'baseline'}, 48 h on two nodes of 8 A100"
        yield Row(f"table7_{name}", where, f"512,eps,post{extra}", changes, "pretrain_eps", {"fid": fid})


def _table9():
    changes = {"sampling.steps": 250}
    for name, sampler, fid in (("eps", "ddim", 3.02), ("flow", "rk4", 2.49)):
        extra = changes | {"sampling.sampler": sampler}
        where, init = f"Table 9, {name}, 250 steps of {sampler}, against the training set", f"pretrain_{name}"
        yield Row(f"table9_{name}", where, f"512,{name},post,lpl", extra, init, {"fid": fid})


def _ablations():
    def row(name, where, changes, arguments="512,eps,post,lpl", **paper):
        return Row(name, where, arguments, changes, "pretrain_eps", paper)

    for tau in (1.0, 2.0, 3.0, 4.5, 6.0, 10.0, 20.0, float("inf")):
        changes = {"lpl.tau": tau, "lpl.tau_ref_resolution": 512}
        yield row(f"figure6_tau{tau:g}", f"Fig. 6, tau = {tau:g}", changes)
    yield row("figure7_taps0", "Fig. 7, no decoder blocks", {}, "512,eps,post")
    for taps in (1, 2, 3, 4, 5):
        yield row(f"figure7_taps{taps}", f"Fig. 7, {taps} decoder blocks", {"lpl.taps": taps})
    yield row("figure7_rgb", "Fig. 7, decoded images", {"lpl.taps": "rgb"})
    for weight in (0.0, 0.3, 1.0, 3.0, 10.0, 30.0):
        arguments = "512,eps,post,lpl" if weight else "512,eps,post"
        changes = {"lpl.weight": weight} if weight else {}
        yield row(f"figure9_weight{weight:g}", f"Fig. 9, weight {weight:g}", changes, arguments)
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
    every = {"checkpoints": "all"}
    scratch = kept | {"ema.start": 0}
    yield from _pair("figure14", "Fig. 14 and 16, from scratch at 256", "256,eps", scratch, evaluate=every)
    post = "256,eps,post"
    yield from _pair("figure15", "Fig. 15 and 17, post-training at 256", post, kept, "pretrain_eps", evaluate=every)
    average = kept | {"ema.start": 50_000}
    where = "Fig. 18, averages from 50k on"
    yield from _pair("figure18", where, post, average, "pretrain_eps", evaluate=every | {"weights": "params,0.9999"})
    steps = {"steps": "5,10,15,25,50,100,200"}
    yield from _pair("figure8", "Fig. 8, sampling steps", "512,eps,post", None, "pretrain_eps", evaluate=steps)
    guidance = {"guidance": "1,1.25,1.5,1.75,2,2.25,2.5,2.75,3"}
    yield Row("figure19", "Fig. 19, guidance", "512,eps,post", {}, "pretrain_eps", evaluate=guidance)
    for tau in (0.5, 1.0, 1.5, 3.0, 6.0):
        changes = {"lpl.tau": tau, "lpl.tau_ref_resolution": 256}
        yield Row(f"figure20_tau{tau:g}", f"Fig. 20, tau = {tau:g}", f"{post},lpl", changes, "pretrain_eps")
    plain = {"ema.decays": (), "sampling.guidance": 1.0, "train.steps": 100_000}
    yield from _pair("figure21", "Fig. 21, no guidance, no average", post, plain, "pretrain_eps")


PARTS = (_pretraining, _table2, _table3, _table4, _comparisons, _table7, _table9, _ablations, _curves)
ROWS: dict[str, Row] = {row.name: row for part in PARTS for row in part()}


def get_config(arguments: str = ""):
    """arguments: the name of a row."""
    name = base.one_of("configs/paper.py", base.choose("configs/paper.py", arguments, tuple(ROWS)), tuple(ROWS))
    row = ROWS[name]
    config = DATASETS[row.dataset].get_config(row.arguments)
    for field, value in row.changes.items():
        section, _, key = field.partition(".")
        with config.ignore_type():
            config[section][key] = value
    if row.init is None:
        return config
    config.train.init_from = ""  # to be given: the folder of row.init
    return config
