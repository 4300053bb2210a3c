"""What a training step costs: operations by part, XLA's own count and memory plan, and measured time.

    lpl profile --config imagenet:512,lpl
    lpl profile --config quickstart:lpl --run --out profile
    lpl profile --table8

No data set and no weights are needed: of the autoencoder only the architecture counts. What the numbers mean:
docs/flops.md.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from lpl_jax import autoencoders, parallel
from lpl_jax.autoencoders import Autoencoder, AutoencoderConfig
from lpl_jax.cost import flops, step_cost
from lpl_jax.denoisers import preset
from lpl_jax.errors import InputError
from lpl_jax.evaluation.cards import context
from lpl_jax.experiment import Experiment, build, resolve
from lpl_jax.io.hub import is_hub_id
from lpl_jax.text import TextConditioner, TextConfig, abstract_conditioner, load_conditioner
from lpl_jax.tools import cli, config_file, flags

# Architectures behind hub ids, so that nothing has to be fetched to count operations.
_asymmetric = functools.partial(AutoencoderConfig, mask_condition=True)
LAYOUTS = {
    "stabilityai/sdxl-vae": AutoencoderConfig(scaling_factor=0.13025),
    "stabilityai/sd-vae-ft-mse": AutoencoderConfig(),
    "stabilityai/sd-vae-ft-ema": AutoencoderConfig(),
    "cross-attention/asymmetric-autoencoder-kl-x-1-5": _asymmetric(
        decoder_channels=(192, 384, 768, 768), decoder_resnets=4
    ),
    "cross-attention/asymmetric-autoencoder-kl-x-2": _asymmetric(
        decoder_channels=(256, 512, 1024, 1024), decoder_resnets=6
    ),
}
TOWERS = {
    "openai/clip-vit-large-patch14": TextConfig(768, layers=12, heads=12, mlp_width=3072),
    "openai/clip-vit-base-patch32": TextConfig(512, layers=12, heads=8, mlp_width=2048),
}
PARTS = {
    "encoder": "encoder forward",
    "text": "text tower forward",
    "denoiser_forward": "denoiser forward",
    "denoiser_backward": "denoiser backward",
    "clean_decode": "clean decode forward",
    "predicted_decode": "predicted decode forward",
    "predicted_backward": "predicted decode, gradient of its input",
}
DECODER_PARTS = ("clean_decode", "predicted_decode", "predicted_backward")


class Row(NamedTuple):
    """A printed number of Tables 7 and 8."""

    name: str
    resolution: int
    images: int  # per GPU and iteration
    lpl: bool
    printed: float  # TFLOP per GPU and iteration


ROWS = {
    "256": Row("Table 8, ImageNet, 256 px", 256, 64, False, 63.389),
    "256 text": Row("Table 8, CC12M and S320M, 256 px", 256, 64, False, 63.391),
    "256 LPL": Row("Table 8, ImageNet, 256 px, LPL", 256, 64, True, 99.987),
    "256 text LPL": Row("Table 8, CC12M, 256 px, LPL", 256, 64, True, 100.064),
    "512": Row("Table 8, 512 px", 512, 16, False, 69.342),
    "512 LPL": Row("Tables 7 and 8, ImageNet, 512 px, LPL", 512, 16, True, 106.581),
    "512 text LPL": Row("Table 8, CC12M, 512 px, LPL", 512, 16, True, 106.583),
    "512 large": Row("Table 7, 512 px, 25 images per GPU", 512, 25, False, 108.347),
}
DECODED = 0.46 * 2 / 3  # one share of decoded images for all rows with the loss, see docs/flops.md
# Thousands of iterations in whole trainings of Table 8 (ImageNet): 600 at 256 px, then 200 at 256 px or 120 at 512 px.
TOTALS = (
    ("256 px", {"256": 800}),
    ("256 px, LPL", {"256": 600, "256 LPL": 200}),
    ("512 px", {"256": 600, "512": 120}),
    ("512 px, LPL", {"256": 600, "512 LPL": 120}),
)


def parser() -> cli.Parser:
    """The flags of `lpl profile`."""
    result = cli.Parser(__doc__, prog="lpl profile")
    add = result.add_argument
    add("--compile", action="store_true", help="compile the step: XLA's count of operations and its memory plan")
    text = "also run it, on random latents: step time, images/s, MFU, peak memory"
    add("--run", action="store_true", help=text)
    add("--repeats", type=cli.positive, metavar="N", default=10, help="timed steps, of which the median counts")
    add(
        "--peak-tflops", type=cli.number, metavar="X", help="peak of one device, for MFU"
    ).note = "known for common TPUs and GPUs"
    flags.add(result, "out")
    text = "the paper's Tables 7 and 8 from our formulas, beside the printed values; stands alone"
    add("--table8", action="store_true", help=text)
    flags.add_config(result)
    return result


def main(argv: Sequence[str]) -> int:
    """Arguments behind the verb -> exit status."""
    args = parser().parse_args(argv)
    if args.table8:
        if len(argv) > 1:
            raise InputError("--table8 stands alone: it counts the paper's own configurations")
        print(table8(), end="")
        return 0
    config = config_file.given(args)
    if args.peak_tflops is not None and not args.run:
        raise InputError("--peak-tflops is for measured steps: give --run too")
    if args.peak_tflops is not None and args.peak_tflops <= 0:
        raise InputError(f"--peak-tflops {args.peak_tflops:g}: must be above 0")
    if "train" in config:
        with config.unlocked():
            config.train.init_from = None  # what a run starts from costs nothing
    experiment = build(config)
    autoencoder, note = open_autoencoder(experiment)
    text = open_text(experiment)
    experiment = resolve(experiment, autoencoder.config, text.clip.config.text if text else None)
    report = profile(
        experiment,
        autoencoder,
        text,
        compile=args.compile or args.run,
        run=args.run,
        repeats=args.repeats,
        peak=args.peak_tflops,
    )
    report = {"autoencoder": note} | report | {"context": context(["lpl", "profile", *argv])}
    page = markdown(report)
    print(page, end="")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "profile.md").write_text(page)
        (args.out / "profile.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwritten to {args.out}")
    return 0


def open_autoencoder(experiment: Experiment) -> tuple[Autoencoder, str]:
    """The autoencoder and a line on where it is from: with shapes in place of weights if its architecture is known."""
    source = experiment.autoencoder
    if is_hub_id(source.source) and source.source in LAYOUTS:
        config = dataclasses.replace(LAYOUTS[source.source], name=source.source, dtype=source.dtype)
        shapes = jax.eval_shape(functools.partial(autoencoders.init, config), jax.random.key(0))
        return shapes, f"{source.source}: the published architecture; nothing fetched, random weights where run"
    return autoencoders.load(**dataclasses.asdict(source)), f"{source.source}: loaded"


def open_text(experiment: Experiment) -> TextConditioner | None:
    """The text tower of a run on text: with shapes in place of weights if its architecture is known."""
    source = experiment.text
    if source is None:
        return None
    if is_hub_id(source.source) and source.source in TOWERS and source.subfolder is None:
        return abstract_conditioner(source, TOWERS[source.source])
    return load_conditioner(source)[0]


def profile(
    experiment: Experiment,
    autoencoder: Autoencoder,
    text: TextConditioner | None = None,
    *,
    compile: bool = False,
    run: bool = False,
    repeats: int = 10,
    peak: float | None = None,
) -> dict[str, Any]:
    """All that is known about the step of a resolved experiment, as plain values. `run` needs `compile`."""
    mesh = parallel.make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        report = step_cost.analyse(experiment, autoencoder, text)
        traced = report["traced"] = step_cost.trace(experiment, autoencoder, mesh, text)
        if compile:
            compiled, report["compiled"] = step_cost.compile_step(experiment, autoencoder, mesh, text)
            missed = (traced["step"] - traced["bodies_once"]) / mesh.size
            report["compiled"] |= {"devices": mesh.size, "flops_with_loops": report["compiled"]["flops"] + missed}
        if run:
            measured = step_cost.measure(experiment, autoencoder, mesh, compiled, text, repeats=repeats)
            model_flops = report["analytic"]["usual"]["total"] * experiment.train.batch_size
            report["measured"] = measured | step_cost.utilisation(measured["step_seconds"], model_flops, mesh, peak)
    return report


# --- text ---


def markdown(report: dict[str, Any]) -> str:
    """The report as a Markdown page."""
    lines = ["# Cost of a training step", "", *_head(report), "", *_parts(report), "", *_totals(report)]
    if "compiled" in report:
        lines += ["", *_compiled(report["compiled"], report["traced"])]
    if "measured" in report:
        lines += ["", *_measured(report["measured"])]
    return "\n".join(lines) + "\n"


def _head(report):
    sizes = {name: f"{count / 1e6:.2f}M" for name, count in report["parameters"].items()}
    decoding = report["decoding"]
    lines = [
        f"- {report['resolution']} px, {report['batch_size']} images a step; autoencoder {report['autoencoder']}",
        f"- parameters: {', '.join(f'{name} {size}' for name, size in sizes.items())}",
    ]
    if decoding["images"]:
        lines.append(
            f"- perceptual loss: {decoding['active_fraction']:.4f} of the timesteps expected under the threshold; "
            f"{decoding['images']} of {report['batch_size']} images decoded, q = {decoding['share']:.4f}"
        )
    if report["comparison"] == "reweighting":
        lines.append("- Eq. 15: the perceptual loss of every image is measured, without gradient")
    elif report["comparison"]:
        lines.append(f"- comparison loss {report['comparison']}: in the traced count alone")
    return lines


def _parts(report):
    share = report["decoding"]["share"]
    lines = ["| part, GFLOP for each image | images | paper | usual |", "|---|---|---|---|"]
    for part, title in PARTS.items():
        decoder = part in DECODER_PARTS
        if not (decoder and not share) and report["analytic"]["paper"][part]:
            cells = _cells(report, part, 1e9)
            lines.append(f"| {title} | {'q' if decoder else 'all'} | {cells} |")
    return lines


def _totals(report):
    batch, traced = report["batch_size"], report["traced"]["step"]
    lines = ["| total | paper | usual | traced |", "|---|---|---|---|"]
    lines.append(f"| without perceptual loss, GFLOP per image | {_cells(report, 'base', 1e9)} | |")
    if report["decoding"]["images"]:
        lines += [
            f"| perceptual loss, GFLOP per image | {_cells(report, 'perceptual', 1e9)} | |",
            f"| ratio with / without | {_cells(report, 'ratio', 1)} | |",
            f"| ratio if only active images were decoded | {_cells(report, 'ratio_at_active_fraction', 1)} | |",
        ]
    lines += [
        f"| step, GFLOP per image | {_cells(report, 'total', 1e9)} | {_number(traced / batch / 1e9)} |",
        f"| step, TFLOP | {_cells(report, 'total', 1e12 / batch)} | {_number(traced / 1e12)} |",
    ]
    return lines


def _cells(report, name, unit):
    return " | ".join(_number(report["analytic"][c.name][name] / unit) for c in flops.CONVENTIONS)


def _number(value: float) -> str:
    return f"{value:,.3f}" if value >= 1 or not value else f"{value:.4g}"


def _compiled(compiled, traced):
    memory = ", ".join(f"{kind} {_size(size)}" for kind, size in compiled["memory"].items())
    return [
        f"Compiled for {compiled['backend']} in {compiled['compile_seconds']:.1f} s; for each of {compiled['devices']} "
        "device(s):",
        "",
        f"- XLA's own count: {_number(compiled['flops'] / 1e9)} GFLOP a step, with the bodies of loops counted once; "
        f"{_number(compiled['flops_with_loops'] / 1e9)} with the products of scanned layers as often as they run",
        f"- memory plan: {memory or 'the backend has none'}",
    ]


def _measured(measured):
    low, high = measured["step_seconds_range"]
    use = "unknown peak: give --peak-tflops"
    if measured["mfu"] is not None:
        use = f"{measured['mfu']:.1%} of {measured['peak_tflops']:g}"
    memory = ", ".join(f"{name} {_size(size)}" for name, size in measured["memory"].items())
    return [
        f"Measured on {measured['devices']} x {measured['device_kind']}, {measured['repeats']} steps:",
        "",
        f"- step {measured['step_seconds']:.4g} s (median; {low:.4g} to {high:.4g}), "
        f"{measured['images_per_second']:.4g} images/s",
        f"- {measured['tflops_per_device']:.4g} TFLOP/s a device in the usual convention (MFU: {use})",
        f"- memory: {memory or 'the backend does not say'}",
    ]


def _size(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"


# --- the paper's tables ---


def row_tflops(row: Row, decoded: float = DECODED) -> float:
    """TFLOP per GPU and iteration in the paper's convention: `paper796` with control MLPs, SD or SDXL autoencoder."""
    model, share = preset("paper796", control=True), decoded if row.lpl else 0.0
    parts = flops.step_flops(flops.PAPER, model, AutoencoderConfig(), row.resolution, decoded=share)
    return row.images * parts.total / 1e12


def fitted_share(row: Row) -> float:
    """The share of decoded images that gives the printed number."""
    base, full = (row_tflops(row, share) for share in (0.0, 1.0))
    return (row.printed - base) / (full - base)


def table8() -> str:
    """Tables 7 and 8 of the paper, as Markdown, beside our formulas."""
    lines = [
        f"TFLOP per GPU and iteration; with LPL a share q = {DECODED:.5f} of the images is decoded. The last column is "
        "the q that gives the printed number.",
        "",
        "| row | images per GPU | printed | ours | difference | q |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS.values():
        ours, share = row_tflops(row), f"{fitted_share(row):.5f}" if row.lpl else ""
        lines.append(
            f"| {row.name} | {row.images} | {row.printed:.3f} | {ours:.3f} | {ours - row.printed:+.3f} | {share} |"
        )
    lines += ["", *text_variants()]
    lines += ["", "| whole training, ImageNet | printed, TFLOP | ours | difference |", "|---|---|---|---|"]
    for name, iterations in TOTALS:
        printed, ours = (
            sum(1000 * count * value(ROWS[key]) for key, count in iterations.items())
            for value in (lambda row: row.printed, row_tflops)
        )
        lines.append(f"| {name} | {printed:,.0f} | {ours:,.0f} | {ours / printed - 1:+.3%} |")
    return "\n".join(lines) + "\n"


def text_variants() -> list[str]:
    """What a step on captions costs in the paper's convention, by what of the text is counted."""
    text = dict(num_classes=0, context_dim=768)
    pooled = text | {"pooled_dim": 768}
    variants = (
        ("a class label", {}, 1, False),
        ("one text token of width 768", text, 1, False),
        ("the same and a pooled vector", pooled, 1, False),
        ("77 text tokens and a pooled vector", pooled, 77, False),
        ("the same and CLIP ViT-L/14", pooled, 77, True),
    )
    lines = ["| condition | 256 px | 256 px, LPL | 512 px | 512 px, LPL |", "|---|---|---|---|---|"]
    tower = TOWERS["openai/clip-vit-large-patch14"]
    for name, changes, tokens, counted in variants:
        model, options = preset("paper796", control=True, **changes), dict(context_tokens=tokens)
        options |= {"tower": tower} if counted else {}
        cells = []
        for key in ("256", "256 LPL", "512", "512 LPL"):
            row = ROWS[key]
            decoded = DECODED if row.lpl else 0.0
            parts = flops.step_flops(
                flops.PAPER, model, AutoencoderConfig(), row.resolution, decoded=decoded, **options
            )
            cells.append(f"{row.images * parts.total / 1e12:.3f}")
        lines.append(f"| Condition: {name} | {' | '.join(cells)} |")
    printed = (ROWS[key].printed for key in ("256 text", "256 text LPL", "512", "512 text LPL"))
    return [*lines, f"| Condition: printed for CC12M | {' | '.join(f'{value:.3f}' for value in printed)} |"]
