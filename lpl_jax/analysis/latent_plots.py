"""Pictures of the analyses of latents and decoder features (paper, Fig. 11 to 13)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lpl_jax.io.pictures import write_figure

DPI = 110
MARKERS = "osD^vP*X"
CURVES = {
    "perceptual_distance": "perceptual distance of the decodes (0 = equal)",
    "psnr_db": "PSNR of the decodes (dB)",
    "detail": "gradient energy of the decodes (1 = as sharp)",
}
KEPT_RANGE = (0.001, 0.999)  # quantiles of the kept values that span the grey scale of a feature map


def plot_interpolation(path: Path, rows: Sequence[Mapping]) -> None:
    """Errors of the decoded images over the error in the latent, a curve for each method (Fig. 11).

    Args:
      rows: `method`, `factor`, `latent_mse` and the columns of `CURVES` of each point; points without error
        are left out.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(CURVES), figsize=(5.2 * len(CURVES), 4.4), layout="constrained")
    for axis, (column, label) in zip(axes, CURVES.items(), strict=True):
        for index, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            mine = [row for row in rows if row["method"] == method and row["latent_mse"] > 0]
            style = {"marker": MARKERS[index % len(MARKERS)], "markersize": 5, "linewidth": 0.6, "color": f"C{index}"}
            axis.plot(*_columns(mine, "latent_mse", column), label=method, **style)
            side = (4, 4) if index % 2 else (-4, -10)  # neighbouring curves have their numbers on different sides
            for row in mine:
                place, text = (row["latent_mse"], row[column]), f"{row['factor']:g}"
                axis.annotate(text, place, side, textcoords="offset points", fontsize=7, color=f"C{index}")
        axis.set(xscale="log", xlabel="MSE of the latents", ylabel=label)
        axis.grid(alpha=0.25)
    axes[0].set_yscale("log")
    axes[0].legend(title="numbers: factor", fontsize=8, title_fontsize=8)
    _save(figure, path)


def plot_decodes(path: Path, images: Mapping[tuple[str, float], np.ndarray], titles: Mapping, reference) -> None:
    """Decodes of resampled latents: a row for each method, a column for each factor, the original's decode first.

    Args:
      images: (method, factor) -> image (H, W, 3) in [-1, 1].
      titles: (method, factor) -> line above the image.
      reference: decode of the original latent.
    """
    plt = _pyplot()
    methods = list(dict.fromkeys(method for method, _ in images))
    factors = list(dict.fromkeys(factor for _, factor in images))
    shape = len(methods), len(factors) + 1
    figure, axes = plt.subplots(*shape, figsize=(2 * shape[1], 2.2 * shape[0]), squeeze=False, layout="constrained")
    for row, method in zip(axes, methods, strict=True):
        _show(row[0], reference, "original")
        row[0].set_ylabel(method, fontsize=9)
        for axis, factor in zip(row[1:], factors, strict=True):
            _show(axis, images[method, factor], titles[method, factor])
    _save(figure, path)


def plot_irregularity(
    path: Path, maps: np.ndarray, names: Sequence[str], title: str, images: np.ndarray | None = None
) -> None:
    """Heat maps of the image error over the position of the disturbed patch, a row for each image (Fig. 12).

    Args:
      maps: (N, rows, columns, 2): total error, error outside the patch. Every map has its own colour scale.
      names: of the N images.
      images: (N, H, W, 3) in [-1, 1], shown beside the maps and, in grey, below them; None leaves them out.
    """
    plt = _pyplot()
    count, extra = len(maps), 0 if images is None else 2
    size = (2.7 * extra + 6.4, 2.8 * count + 0.4)
    figure, axes = plt.subplots(count, 2 + extra, figsize=size, squeeze=False, layout="constrained")
    for index, row in enumerate(axes):
        row[0].set_ylabel(names[index], fontsize=9)
        if images is not None:
            height, width = images.shape[1:3]
            _show(row[0], images[index], "image")
            row[1].imshow(images[index].mean(-1), cmap="gray", vmin=-1, vmax=1, extent=(0, width, height, 0))
            row[1].imshow(maps[index, ..., 0], cmap="inferno", alpha=0.6, vmin=0, extent=(0, width, height, 0))
            row[1].set_title("total error over the image", fontsize=9)
        for axis, part, label in zip(row[extra:], (0, 1), ("total error", "outside the patch"), strict=True):
            shown = axis.imshow(maps[index, ..., part], cmap="inferno", vmin=0)
            figure.colorbar(shown, ax=axis, shrink=0.8)
            mean, spread = maps[index, ..., part].mean(), maps[index, ..., part].std()
            axis.set_title(f"{label}: {mean:.3g} ± {spread:.2g}", fontsize=9)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def plot_outliers(
    path: Path,
    maps: np.ndarray,
    keep: np.ndarray,
    titles: Sequence[str],
    thresholds: np.ndarray,
    image: np.ndarray | None = None,
) -> None:
    """Feature maps, the same with the mask in red, and histograms of their values, a row for each channel (Fig. 13).

    Args:
      maps, keep: features and mask (H, W, K) of K channels.
      titles: of the channels.
      thresholds: (K, 2): values below the first or above the second are outliers, before the filters.
      image: the image that they belong to, (H', W', 3) in [-1, 1]; None leaves it out.
    """
    plt = _pyplot()
    count, extra = maps.shape[-1], 0 if image is None else 1
    ratios = [1] * (extra + 2) + [1.5]
    size = (2.8 * sum(ratios) + 0.8, 2.9 * count)
    figure, axes = plt.subplots(
        count, len(ratios), figsize=size, squeeze=False, layout="constrained", width_ratios=ratios
    )
    for index, row in enumerate(axes):
        values, kept = maps[..., index], keep[..., index]
        if image is not None:
            _show(row[0], image, "image")
        full = row[extra].imshow(values, cmap="viridis")
        figure.colorbar(full, ax=row[extra], shrink=0.8)
        row[extra].set_title(titles[index], fontsize=9)
        inside = values[kept] if kept.any() else values
        low, high = np.quantile(inside, KEPT_RANGE)
        grey = np.clip((values - low) / max(high - low, 1e-12), 0, 1)[..., None].repeat(3, -1)
        row[extra + 1].imshow(np.where(kept[..., None], grey, (0.85, 0.1, 0.1)))
        row[extra + 1].set_title(f"masked: {1 - kept.mean():.2%} of the pixels", fontsize=9)
        for axis in row[extra : extra + 2]:
            axis.set(xticks=[], yticks=[])
        _histogram(row[-1], values, kept, thresholds[index])
    _save(figure, path)


def _histogram(axis, values, kept, thresholds):
    bins = np.linspace(values.min(), values.max() + 1e-12, 80)
    axis.hist([values[kept], values[~kept]], bins=bins, stacked=True, color=["0.6", (0.85, 0.1, 0.1)])
    for threshold in thresholds:
        if bins[0] <= threshold <= bins[-1]:
            axis.axvline(threshold, color="black", linestyle=":", linewidth=1)
    axis.set(yscale="log", xlabel="value", ylabel="pixels")
    axis.set_title("grey: kept, red: masked, dotted: threshold", fontsize=9)


def _columns(rows, *names):
    return [[row[name] for row in rows] for name in names]


def _show(axis, image, title):
    axis.imshow((np.clip(image, -1, 1) + 1) / 2)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)


def _save(figure, path):
    write_figure(path, figure, DPI)
    _pyplot().close(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
