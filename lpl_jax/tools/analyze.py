"""Analyse a latent space on real images: the paper's Fig. 11, 12 and 13 for any autoencoder and any images.

    lpl analyze interp --images photos --out out/interp --autoencoder stabilityai/sdxl-vae --resolution 512
    lpl analyze irregularity --images photos --out out/irregularity
    lpl analyze outliers --images photos --taps up_2 --channels 2,8 --out out/outliers

What they show: docs/analyses.md.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lpl_jax.analysis import interpolation, irregularity, latent_plots, outlier_maps
from lpl_jax.autoencoders import Autoencoder
from lpl_jax.data import open_source
from lpl_jax.data.sources import PHOTOS, indexed
from lpl_jax.errors import InputError
from lpl_jax.evaluation.image_sets import open_images
from lpl_jax.io.atomic import write_csv
from lpl_jax.io.locks import only_writers
from lpl_jax.io.progress import progress_bar
from lpl_jax.losses import LPLConfig
from lpl_jax.runs import open_run
from lpl_jax.tools import cli, flags

PHOTO_RESOLUTION = 256
SIDE = cli.whole(1, 2**12)  # of a patch of latents
SHOWN_IMAGES = 4  # in a figure of heat maps


def main(argv: Sequence[str]) -> int:
    """Arguments after the verb -> exit status."""
    args = parser().parse_args(argv)
    flags.check_out(args)
    args.check(args)
    autoencoder = autoencoder_of(args)
    if args.resolution is not None:
        autoencoder.check_side(args.resolution, "--resolution")
    names, images = read_images(args.images, args.resolution, args.count, args.seed)
    autoencoder.check_side(min(images.shape[1:3]), "side of the images")
    with only_writers(args.out):  # also: a folder that cannot be written is noticed before the work
        args.run(args, autoencoder, names, images)
    return 0


def autoencoder_of(args) -> Autoencoder:
    """That of a run, or the one that is named."""
    if args.workdir is None:
        return flags.load_autoencoder(args)
    if args.autoencoder or args.autoencoder_subfolder or args.autoencoder_variant:
        raise InputError("give one of --workdir (its autoencoder is taken) and --autoencoder")
    return open_run(args.workdir).autoencoder.with_dtype("float32")


def read_images(spec: str, resolution: int | None, count: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Names and uint8 images (N, H, W, 3) of `photos` or a folder, `count` of them at most.

    Of a folder with more images than that, which ones is drawn by `seed`; photos are random crops drawn by it.
    """
    if spec == "photos":
        crops = -(-count // len(PHOTOS))
        source = open_source("photos", PHOTO_RESOLUTION if resolution is None else resolution, crops=crops, seed=seed)
        examples = [indexed(source)[index] for index in range(count)]
        return [example.key for example in examples], np.stack([example.image for example in examples])
    images = open_images(spec, resolution=resolution)
    rows = np.sort(np.random.default_rng(seed).permutation(len(images))[:count])
    read = progress_bar(rows, desc="reading", unit="image", leave=False)
    return [images.names[int(row)] for row in rows], np.concatenate([images[row : row + 1] for row in read])


def interp(args, autoencoder: Autoencoder, names: Sequence[str], images: np.ndarray) -> None:
    """Fig. 11: interp.csv, interp.png and, with images, interp_images.png of the first image."""
    methods, factors = _methods(args), _factors(args)
    config = interpolation.distance_config()
    keys = [(method, factor) for method in methods for factor in factors]
    errors, shown, original = {key: [] for key in keys}, {}, None
    batches = _batches(len(images), args.batch_size)
    with progress_bar(total=len(batches) * len(keys), desc="interp", unit="resampling") as bar:
        for rows, valid in batches:
            batch = _to_float(images[rows])
            latents = interpolation.encode(autoencoder, batch)
            clean = interpolation.reference(autoencoder, latents, config)
            original = clean.images[0] if original is None else original
            for method, factor in keys:
                changed = interpolation.resampled_latents(autoencoder, batch, latents, method, factor)
                *numbers, decoded = interpolation.compare(autoencoder, changed, clean, config)
                errors[method, factor].append(np.stack(numbers, axis=1)[:valid])
                shown.setdefault((str(method), factor), np.asarray(decoded[0]))
                bar.update()
    pixels = images.shape[1:3]
    sides = {"pixel": pixels, "latent": [side // autoencoder.config.downsample for side in pixels]}
    rows = [
        _interp_row(method, factor, np.concatenate(errors[method, factor]), sides[method.space])
        for method, factor in keys
    ]
    write_csv(args.out / "interp.csv", rows)
    latent_plots.plot_interpolation(args.out / "interp.png", rows)
    if not args.no_images:
        latent_mse = {key: float(errors[key][0][0, 0]) for key in keys}  # of the image that is shown
        titles = {(str(method), s): f"s={s:g}, latent MSE {value:.3g}" for (method, s), value in latent_mse.items()}
        latent_plots.plot_decodes(args.out / "interp_images.png", shown, titles, np.asarray(original))
    worse = {"perceptual distance": "perceptual_distance", "PSNR": "psnr_db", "gradient energy": "detail"}
    counts = []
    for title, column in worse.items():
        sign = 1 if column == "perceptual_distance" else -1
        other = [sign * row[column] for row in rows]
        differing, pairs = interpolation.disagreements([row["latent_mse"] for row in rows], other)
        counts.append(f"{differing} of {pairs} otherwise than {title}")
    print(f"{len(images)} images, {len(rows)} resamplings: latent MSE orders pairs of them {', '.join(counts)}")


def check_interp(args) -> None:
    """Raises InputError for flags of interp that cannot be."""
    _methods(args)
    _factors(args)


def _methods(args) -> list[interpolation.Method]:
    return [interpolation.Method.parse(name) for name in args.methods.split(",")]


def _factors(args) -> tuple[float, ...]:
    factors = _numbers("--factors", args.factors, float)
    if not all(1 <= factor < math.inf for factor in factors):
        raise InputError(f"--factors {args.factors}: must be numbers of 1 or more (sizes are divided by them)")
    return factors


def _interp_row(method, factor, errors, sides) -> dict:
    height, width = (interpolation.reduced_size(side, factor) for side in sides)
    latent_mse, psnr, distance, detail = errors.mean(axis=0, dtype=np.float64).tolist()
    return {
        "method": str(method),
        "factor": factor,
        "reduced_to": f"{height}x{width}",
        "latent_mse": latent_mse,
        "psnr_db": psnr,
        "perceptual_distance": distance,
        "detail": detail,
        "images": len(errors),
    }


def irregular(args, autoencoder: Autoencoder, names: Sequence[str], images: np.ndarray) -> None:
    """Fig. 12: irregularity.csv and irregularity.png, the latter of the first images."""
    if args.noise == irregularity.MASKED:
        args.draws = 1
    options: dict[str, Any] = {
        name: getattr(args, name) for name in ("patch", "stride", "noise", "draws", "batch_size")
    }
    maps = []
    with progress_bar(total=len(images) * max(args.draws, 0), desc="irregularity", unit="draw") as bar:
        for index in range(len(images)):
            latent = interpolation.encode(autoencoder, _to_float(images[index : index + 1]))[0]
            key = jax.random.fold_in(jax.random.key(args.seed), index)
            maps.append(irregularity.irregularity_maps(autoencoder, latent, key, on_draw=bar.update, **options))
    maps, stride = np.stack(maps), args.patch if args.stride is None else args.stride
    height, width = (side // autoencoder.config.downsample for side in images.shape[1:3])
    corners = irregularity.patch_positions(height, width, args.patch, stride)
    rows = [
        {"image": name, "row": row, "column": column, "total_error": total, "outside_error": outside}
        for name, image_map in zip(names, maps.tolist(), strict=True)
        for line, places in zip(image_map, corners.tolist(), strict=True)
        for (total, outside), (row, column) in zip(line, places, strict=True)
    ]
    write_csv(args.out / "irregularity.csv", rows)
    footprint = args.patch * autoencoder.config.downsample
    change = args.noise if args.noise == irregularity.MASKED else f"{args.noise} noise on"
    title = f"{change} patches of {args.patch}x{args.patch} latents ({footprint}x{footprint} pixels)"
    first = slice(SHOWN_IMAGES)
    shown = None if args.no_images else _to_float(images[first])
    latent_plots.plot_irregularity(args.out / "irregularity.png", maps[first], names[first], title, shown)
    total, outside = maps[..., 0].reshape(len(maps), -1), maps[..., 1].reshape(len(maps), -1)
    largest, smallest = total.max(axis=1), total.min(axis=1)
    print(
        f"{len(images)} images, {total.shape[1]} positions, {args.draws} draws, {args.noise}: error {total.mean():.4g} "
        f"per patch, {outside.sum() / total.sum():.1%} of it outside the patch; over positions of one image it varies "
        f"by {np.mean(total.std(axis=1) / total.mean(axis=1)):.1%} (standard deviation / mean), largest / smallest "
        f"{np.median(largest / smallest):.3g} (median over images)"
    )


def check_outliers(args) -> None:
    """Raises InputError for flags of outliers that cannot be, whatever the images and the autoencoder are."""
    asked = _channels(args)
    if args.show >= args.count:
        raise InputError(f"--show {args.show}: must be less than --count {args.count}, the number of images")
    if args.top + len(asked) == 0:
        raise InputError(f"--top {args.top}: must be at least 0, and at least 1 without --channels")


def _channels(args) -> tuple[int, ...]:
    return _numbers("--channels", args.channels, int) if args.channels else ()


def outliers(args, autoencoder: Autoencoder, names: Sequence[str], images: np.ndarray) -> None:
    """Fig. 13: outliers_channels.csv, outliers_taps.csv, and outliers_TAP.png of one image for each tap."""
    taps, config = (
        outlier_maps.parse_taps(autoencoder, args.taps.split(",") if args.taps else ()),
        LPLConfig.preset(args.preset),
    )
    asked = _channels(args)
    if not 0 <= args.show < len(images):
        raise InputError(f"--show {args.show}: must be 0 to {len(images) - 1}, the number of an image")
    image = _to_float(images[args.show : args.show + 1])
    shown = outlier_maps.features(autoencoder, interpolation.encode(autoencoder, image), taps)
    for tap, maps in zip(taps, shown, strict=True):
        if unknown := [channel for channel in asked if not 0 <= channel < maps.shape[-1]]:
            name = autoencoder.config.tap_names[tap]
            raise InputError(f"--channels {unknown[0]}: {name} has channels 0 to {maps.shape[-1] - 1}")
    parts = {tap: [] for tap in taps}
    for rows, valid in progress_bar(_batches(len(images), args.batch_size), desc="outliers", unit="batch"):
        latents = interpolation.encode(autoencoder, _to_float(images[rows]))
        for tap, maps in zip(taps, outlier_maps.features(autoencoder, latents, taps), strict=True):
            measured = outlier_maps.measure(maps, tap, config)[1]
            parts[tap].append([np.asarray(part)[:valid] for part in measured])
    tap_rows, channel_rows = [], []
    for tap, maps in zip(taps, shown, strict=True):
        columns: Any = map(np.concatenate, zip(*parts[tap], strict=True))
        measured = outlier_maps.TapStatistics(*columns)
        name = autoencoder.config.tap_names[tap]
        channel_rows += _channel_rows(name, measured)
        tap_rows.append(_tap_row(name, tap, maps.shape, measured, config))
        path = args.out / f"outliers_{name}.png"
        channels = outlier_maps.extreme_channels(outlier_maps.max_median_ratio(measured), args.top)
        channels = list(dict.fromkeys((*channels, *asked)))
        shown = None if args.no_images else image[0]
        _plot_outliers(path, maps, measured, (name, tap, channels), config=config, image=shown)
        print(_tap_summary(tap_rows[-1]))
    write_csv(args.out / "outliers_taps.csv", tap_rows)
    write_csv(args.out / "outliers_channels.csv", channel_rows)


def _plot_outliers(path, maps, measured, chosen, *, config, image) -> None:
    """chosen: name and number of the tap, and the channels to be drawn."""
    name, tap, channels = chosen
    ratio = outlier_maps.max_median_ratio(measured)
    keep = outlier_maps.measure(maps, tap, config)[0]
    latent_plots.plot_outliers(
        path,
        np.asarray(maps[0])[..., channels],
        np.asarray(keep[0])[..., channels],
        [f"{name}, channel {channel}: max/median {ratio[channel]:.3g}" for channel in channels],
        np.asarray(outlier_maps.thresholds(maps, config.quantile)[0])[channels],
        image,
    )


def _tap_summary(row: Mapping) -> str:
    return (
        f"{row['tap']}: {row['images']} images, {row['channels']} channels; {row['masked']:.2%} of the values masked, "
        f"which hold {row['variance_masked']:.2%} of the variance; max/median {row['ratio_median']:.3g} in the median "
        f"channel, {row['ratio_largest']:.3g} in the most extreme one ({row['most_extreme_channel']})"
    )


def _channel_rows(name, measured) -> list[dict]:
    ratio = outlier_maps.max_median_ratio(measured)
    means = [part.mean(axis=0, dtype=np.float64).tolist() for part in measured]
    return [
        {
            "tap": name,
            "channel": channel,
            "max": largest,
            "median": median,
            "max_median_ratio": float(ratio[channel]),
            "masked": masked,
            "variance_masked": variance,
        }
        for channel, (largest, median, masked, variance) in enumerate(zip(*means, strict=True))
    ]


def _tap_row(name, tap, shape, measured, config) -> dict:
    ratio = outlier_maps.max_median_ratio(measured)
    extreme = outlier_maps.extreme_channels(ratio, 1)
    closing, opening = config.kernels(tap, min(shape[1:3]))
    return {
        "tap": name,
        "height": shape[1],
        "width": shape[2],
        "channels": shape[3],
        "closing": closing,
        "opening": opening,
        "masked_in_the_loss": config.masked(tap),
        "masked": float(measured.masked.mean(dtype=np.float64)),
        "variance_masked": float(measured.variance_masked.mean(dtype=np.float64)),
        "ratio_median": float(np.median(ratio[np.isfinite(ratio)])) if extreme else math.nan,
        "ratio_largest": float(ratio[extreme[0]]) if extreme else math.nan,
        "most_extreme_channel": extreme[0] if extreme else "",
        "images": len(measured.masked),
    }


def _batches(count: int, size: int) -> list[tuple[np.ndarray, int]]:
    """Rows of full batches, and how many of them count: the last batch is filled by repetition."""
    size = min(size, count)
    return [(np.arange(start, start + size) % count, min(size, count - start)) for start in range(0, count, size)]


def _to_float(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / 127.5 - 1


def _numbers(flag: str, text: str, kind: type) -> tuple:
    try:
        return tuple(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise InputError(f"{flag} {text!r}: needed: numbers with commas between them") from None


def parser() -> cli.Parser:
    """The flags of `lpl analyze`."""
    result = cli.Parser(__doc__, prog="lpl analyze")
    verbs = result.add_subparsers(dest="command")
    about = "Fig. 11: resampled latents and what they decode to"
    add = _command(verbs, "interp", interp, about, batch_size=8, check=check_interp)
    add("--methods", type=cli.text, metavar="SPACE-MODE[,...]",
        default=",".join(map(str, interpolation.DEFAULT_METHODS)), help="ways of resampling")  # fmt: skip
    factors = ",".join(f"{s:g}" for s in interpolation.DEFAULT_FACTORS)
    add("--factors", type=cli.text, metavar="S[,...]", default=factors, help="sizes are divided by these")
    about = "Fig. 12: image error of noise on one patch of the latent"
    add = _command(verbs, "irregularity", irregular, about, batch_size=32)
    text = "what is put on a patch; masked: it is set to zero"
    add("--noise", **cli.one_of(irregularity.CHANGES), default="half_variance", help=text)
    add("--patch", type=SIDE, metavar="N", default=irregularity.PATCH, help="side of the patch, latent pixels")
    text = "between patches, latent pixels (default: the patch's side)"
    add("--stride", type=SIDE, metavar="N", help=text)
    add("--draws", type=cli.whole(1, 10_000), metavar="N", default=4, help="draws of noise that are averaged")
    about = "Fig. 13: extreme values in decoder features and their masks"
    add = _command(verbs, "outliers", outliers, about, batch_size=8, check=check_outliers)
    text = f"names (mid, up_0 ...) or numbers from 0, or all (default: {outlier_maps.DEFAULT_TAP}, or the last one)"
    add("--taps", type=cli.text, metavar="TAP[,...]", help=text)
    add("--channels", type=cli.text, metavar="N[,...]", help="show these channels, too, by their numbers from 0")
    add(
        "--top",
        type=cli.whole(0, 1000),
        metavar="N",
        default=2,
        help="channels with the largest max/median ratio shown",
    )
    add("--show", type=cli.whole(0, 10_000), metavar="N", default=0, help="number of the image that is shown, from 0")
    add("--preset", **cli.one_of(("paper", "reference")), default="paper", help="filters of the mask")
    return result


def _command(
    verbs, name: str, run: Callable, about: str, batch_size: int, check: Callable = lambda args: None
) -> Callable:
    """Adds a command with the flags that all have; returns its `add_argument`. check: of its own flags."""
    example = f"    lpl analyze {name} --images photos --out out/{name}"
    result = verbs.add_parser(name, help=about, description=f"{about}\n\n{example}")
    result.set_defaults(run=run, check=check)
    flags.add(result, "images", required=True)
    flags.add(result, "out", required=True)
    flags.add(result, "autoencoder", note="bundled")
    flags.add(result, "autoencoder-subfolder")
    flags.add(result, "autoencoder-variant")
    flags.add(result, "workdir", note="none: --autoencoder counts")
    flags.add(result, "resolution", note=f"{PHOTO_RESOLUTION} for photos, else as they are")
    flags.add(result, "count", default=8)
    flags.add(result, "seed", default=0)
    flags.add(result, "batch-size", default=batch_size)
    text = "pictures without the images and their decodes, tables as ever"
    result.add_argument("--no-images", action="store_true", help=text)
    return result.add_argument
