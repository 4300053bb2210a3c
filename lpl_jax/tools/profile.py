"""What a training step costs: operations by part, XLA's own count and memory plan, and measured time.

    lpl profile --config imagenet:512,lpl
    lpl profile --config quickstart:lpl --run --out profile
    lpl profile --table8

No data set and no weights are needed: of the autoencoder only the architecture counts. What the numbers mean:
docs/flops.md.
"""

from collections.abc import Sequence
from typing import Any

from lpl_jax.cost import flops, paper_tables
from lpl_jax.cost.architectures import open_autoencoder, open_text
from lpl_jax.cost.profile import profile_step
from lpl_jax.errors import InputError
from lpl_jax.evaluation.cards import context
from lpl_jax.experiment import build, resolve
from lpl_jax.fields import above
from lpl_jax.io.atomic import write_json, write_text
from lpl_jax.tools import cli, config_file, flags

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


def parser() -> cli.Parser:
    """The flags of `lpl profile`."""
    result = cli.Parser(__doc__, prog="lpl profile")
    add = result.add_argument
    add("--compile", action="store_true", help="compile the step: XLA's count of operations and its memory plan")
    text = "also run it, on random latents: step time, images/s, MFU, peak memory"
    add("--run", action="store_true", help=text)
    add("--repeats", type=cli.whole(1, 10**6), metavar="N", default=10, help="timed steps, of which the median counts")
    text = "peak of one device, for MFU (default: known for common TPUs and GPUs)"
    add("--peak-tflops", type=cli.Number(above(0, 1e9)), metavar="X", help=text)
    flags.add(result, "out")
    text = "the paper's Tables 7 and 8 from our formulas, beside the printed values; stands alone"
    add("--table8", action="store_true", help=text)
    flags.add_config(result)
    return result


def main(argv: Sequence[str]) -> int:
    """Arguments after the verb -> exit status."""
    args = parser().parse_args(argv)
    if args.table8:
        if len(argv) > 1:
            raise InputError("--table8 stands alone: it counts the paper's own configurations")
        print(paper_tables.table8(), end="")
        return 0
    flags.check_out(args)
    config = config_file.given(args)
    if args.peak_tflops is not None and not args.run:
        raise InputError("--peak-tflops is for measured steps: give --run too")
    if "train" in config:
        with config.unlocked():
            starts = dict.fromkeys(("train.init_from", "train.init_step", "train.weight_from"))  # cost nothing
            config.update_from_flattened_dict(starts)
    experiment = build(config)
    autoencoder, note = open_autoencoder(experiment)
    text = open_text(experiment)
    experiment = resolve(experiment, autoencoder.config, text.clip.config.text if text else None)
    report = profile_step(
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
        write_text(args.out / "profile.md", page)
        write_json(args.out / "profile.json", report)
        print(f"\nwritten to {args.out}")
    return 0


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
