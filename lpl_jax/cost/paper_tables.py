"""Tables 7 and 8 of the paper: the printed operations of a step, and the same from our formulas."""

from collections.abc import Callable
from typing import NamedTuple

from lpl_jax.autoencoders import AutoencoderConfig
from lpl_jax.cost import flops
from lpl_jax.cost.architectures import TOWERS
from lpl_jax.denoisers import preset


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
PRETRAINING, POST_TRAINING = 600, {"256": 200, "512": 120}  # thousands of iterations


class Total(NamedTuple):
    """Whole trainings without and with LPL, as Table 8 prints them."""

    name: str
    start: str  # row of the pre-training
    size: str
    rows: tuple[str, str]  # rows of the post-training
    printed: tuple[float, float]  # thousands of TFLOP per GPU
    increase: float  # percent


TOTALS = (
    Total("ImageNet, 256 px", "256", "256", ("256", "256 LPL"), (50_711.20, 58_030.80), 14.43),
    Total("ImageNet, 512 px", "256", "512", ("512", "512 LPL"), (46_354.44, 50_823.12), 9.64),
    Total("CC12M, 256 px", "256 text", "256", ("256 text", "256 text LPL"), (50_712.80, 58_047.40), 14.46),
    Total("CC12M and S320M, 512 px", "256 text", "512", ("512", "512 text LPL"), (46_355.64, 50_824.56), 9.64),
)


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
    return "\n".join([*lines, "", *totals()]) + "\n"


def totals() -> list[str]:
    """Lines of a Markdown table: whole trainings of Table 8 without and with LPL, and what LPL adds."""
    what = "thousands of TFLOP per GPU"
    lines = [
        f"Whole trainings, {PRETRAINING}k iterations at 256 px and then 200k at 256 px or 120k at 512 px, {what}:",
        "",
        "| training | printed without | with LPL | increase | ours without | with LPL | increase |",
        "|---|---|---|---|---|---|---|",
    ]
    for total in TOTALS:
        cells = [f"{value:,.2f}" for value in total.printed] + [f"{total.increase:+.2f} %"]
        ours = [whole_training(total, row, row_tflops) for row in total.rows]
        cells += [f"{value:,.2f}" for value in ours] + [f"{100 * (ours[1] / ours[0] - 1):+.2f} %"]
        lines.append(f"| {total.name} | {' | '.join(cells)} |")
    return lines


def whole_training(total: Total, row: str, value: Callable[[Row], float]) -> float:
    """Pre-training and post-training, thousands of TFLOP per GPU. value: TFLOP of an iteration."""
    return PRETRAINING * value(ROWS[total.start]) + POST_TRAINING[total.size] * value(ROWS[row])


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
        model = preset("paper796", control=True, **changes)
        cells = []
        for key in ("256", "256 LPL", "512", "512 LPL"):
            row = ROWS[key]
            decoded = DECODED if row.lpl else 0.0
            parts = flops.step_flops(
                flops.PAPER,
                model,
                AutoencoderConfig(),
                row.resolution,
                decoded=decoded,
                context_tokens=tokens,
                tower=tower if counted else None,
            )
            cells.append(f"{row.images * parts.total / 1e12:.3f}")
        lines.append(f"| Condition: {name} | {' | '.join(cells)} |")
    printed = (ROWS[key].printed for key in ("256 text", "256 text LPL", "512", "512 text LPL"))
    return [*lines, f"| Condition: printed for CC12M | {' | '.join(f'{value:.3f}' for value in printed)} |"]
