"""Pictures and tables of power spectra: maps of log-ratios (paper, Fig. 4) and curves of errors (Fig. 5)."""

import textwrap
from collections.abc import Mapping

import numpy as np

from lpl_jax.errors import InputError
from lpl_jax.evaluation.spectrum import BANDS, SpectrumSum, band_limits, band_means, error_curve, log_power
from lpl_jax.io.atomic import write_csv
from lpl_jax.io.npy import write_npz
from lpl_jax.io.paths import AnyPath, PathLike, to_path
from lpl_jax.io.pictures import write_figure

SCALE_QUANTILE = 0.995  # of |log-ratio|; beyond is the end colour, so that single frequencies do not set the scale
PER_ROW = 4
SMALLEST_RANGE = 1e-3  # of the colour scale, so that equal sets are not a picture of rounding errors


def plot_maps(path: PathLike, maps: Mapping[str, np.ndarray]) -> None:
    """Log-ratio maps side by side on one colour scale, symmetric about 0, as a PNG, and their numbers beside it.

    The numbers go to the same name with .npz: `titles` (K,) and `log_ratios` (K, H, H), frequency 0 in the middle.

    Args:
      path: of the picture, ending in .png.
      maps: title -> (H, H) from `spectrum.log_ratio_map`, of one size; red is where a pair's first set is stronger.
    """
    path = _png(path)
    shapes = {values.shape for values in maps.values()}
    if len(shapes) != 1:
        raise InputError(f"spectrum maps of shapes {sorted(shapes)}: needed: at least one map, and one size")
    side = shapes.pop()[0]
    stacked = np.stack(list(maps.values()))
    limit = max(float(np.quantile(np.abs(stacked), SCALE_QUANTILE)), SMALLEST_RANGE)
    plt = _pyplot()
    columns = min(len(maps), PER_ROW)
    rows = -(-len(maps) // columns)
    size = (3.2 * columns + 1.4, 3.5 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    first = -(side // 2) - 0.5  # pixels are centred on whole frequencies
    extent = (first, first + side, first + side, first)
    ticks = np.linspace(-(side // 2), side // 2, 5).round().astype(int)
    for axis, (title, values) in zip(axes.flat, maps.items(), strict=False):
        axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent)
        axis.set(xlabel="horizontal frequency", xticks=ticks, yticks=ticks)
        axis.set_title(textwrap.fill(title, 34), fontsize=10)
    for axis in axes.flat[len(maps) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("vertical frequency (cycles/image)")
    extend = "both" if np.abs(stacked).max() > limit else "neither"
    figure.colorbar(
        axes[0, 0].images[0], ax=axes, label=r"$\log_{10} P_A - \log_{10} P_B$", extend=extend, shrink=0.8 / rows
    )
    write_figure(path, figure, 120)
    plt.close(figure)
    write_npz(path.with_suffix(".npz"), {"titles": np.array(list(maps)), "log_ratios": stacked}, compressed=True)


def plot_errors(path: PathLike, sets: Mapping[str, SpectrumSum], reference: SpectrumSum) -> None:
    """Error curves of sets against the reference, with the bands and their means, as a PNG, and a CSV beside it.

    The CSV has the same name and the columns frequency, log10_power:reference, and log10_power:NAME and error:NAME for
    each set. Frequency 0 is in the table but, as in the band means, not in the picture.

    Args:
      path: of the picture, ending in .png.
      sets: name -> spectra, of the reference's size.
    """
    path = _png(path)
    if not sets:
        raise InputError("spectrum errors of no sets: needed: at least one")
    curves = {name: error_curve(spectra, reference) for name, spectra in sets.items()}
    resolution = reference.resolution
    frequency = np.arange(resolution // 2 + 1)
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, curve in curves.items():
        means = band_means(curve, resolution)
        label = f"{name} ({', '.join(f'{means[band]:.3f}' for band in BANDS)})"
        axis.plot(frequency[1:], curve[1:], label=label, linewidth=1.3)
    axis.set(xlim=(1, frequency[-1]), xlabel="frequency (cycles/image)", ylabel=r"error of $\log_{10}$ power")
    axis.set_ylim(0, 1.08 * max(axis.get_ylim()[1], SMALLEST_RANGE))  # room for the names of the bands
    _mark_bands(axis, resolution)
    axis.grid(alpha=0.25)
    # Below the picture: names can be long, and curves go anywhere.
    figure.legend(loc="outside lower left", title=f"mean over {', '.join(BANDS)} band", alignment="left")
    write_figure(path, figure, 120)
    plt.close(figure)
    _write_table(path.with_suffix(".csv"), frequency, sets, reference, curves)


def _mark_bands(axis, resolution: int) -> None:
    edges = (1, *band_limits(resolution), resolution // 2)
    for limit in edges[1:-1]:
        axis.axvline(limit, color="grey", linestyle=":", linewidth=1)
    for band, low, high in zip(BANDS, edges[:-1], edges[1:], strict=True):
        position = (low + high) / 2, 0.985
        axis.text(*position, band, transform=axis.get_xaxis_transform(), ha="center", va="top", color="grey")


def _write_table(path: AnyPath, frequency, sets, reference, curves) -> None:
    columns = {"frequency": frequency, "log10_power:reference": log_power(reference.profile)}
    for name, spectra in sets.items():
        columns |= {f"log10_power:{name}": log_power(spectra.profile), f"error:{name}": curves[name]}
    lines = zip(*(column.tolist() for column in columns.values()), strict=True)
    write_csv(path, [dict(zip(columns, line, strict=True)) for line in lines])


def _png(path: PathLike) -> AnyPath:
    path = to_path(path, "a picture", remote=True)
    if path.suffix.lower() != ".png":
        raise InputError(f"picture {path}: needed: a name that ends in .png")
    return path


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
