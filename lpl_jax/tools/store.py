"""Look into a latent store.

    lpl store verify STORE                  checksums and every record; status 1 where something is wrong
    lpl store stats STORE                   classes, latents, captions, sizes
    lpl store show STORE --out sheet.png    decoded images with their captions or classes

What is in a store: docs/data.md.
"""

import textwrap
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lpl_jax import autoencoders, limits
from lpl_jax.data.inspect import statistics, verify
from lpl_jax.data.store import LatentStore, check_autoencoder
from lpl_jax.errors import InputError
from lpl_jax.io.outputs import check_file
from lpl_jax.io.pictures import SUFFIX, write_picture
from lpl_jax.io.progress import progress_bar
from lpl_jax.tools import cli, flags

MANY_CLASSES = 20  # more are summarised
SMALLEST = 128  # pixels of an image on the sheet; smaller ones are enlarged by a whole number
FONT = 12
MARGIN = 6


def main(argv: Sequence[str]) -> int:
    """Arguments after the verb -> exit status."""
    args = parser().parse_args(argv)
    store = LatentStore(args.store, partial=args.unfinished)
    return {"verify": _verify, "stats": _stats, "show": _show}[args.verb](store, args)


def _verify(store: LatentStore, args) -> int:
    with progress_bar(total=len(store), desc="verify", unit="rec", leave=False) as bar:
        findings = verify(store, bar.update)
    if not findings.counts:
        print(f"{store.path}: {len(store)} records in {len(store.manifest.shards)} shards, all in order")
        return 0
    print("\n".join(findings.examples))
    total = ", ".join(f"{kind} {count}" for kind, count in findings.counts.items())
    print(f"{store.path}: {sum(findings.counts.values())} faults ({total})")
    return 1


def _stats(store: LatentStore, args) -> int:
    if not len(store):
        raise InputError(f"latent store {store.path}: holds no image yet")
    manifest, found = store.manifest, statistics(store, args.records)
    looked_at = found["looked_at"]
    print(f"{store.path}{'' if store.finished else ' (not finished)'}, made from {manifest.source}")
    print(f"records        {len(store)} in {len(manifest.shards)} shards; {manifest.skipped} images skipped")
    print(f"size           {found['bytes'] / 1e6:.1f} MB, {found['bytes_per_record']:.0f} bytes per record")
    print(f"images         {manifest.resolution} px, {manifest.crop}; autoencoder {manifest.autoencoder}")
    print(f"latents        {manifest.latent_shape}, {manifest.dtype}; numbers below from {looked_at} records")
    for name in ("latent_mean", "latent_std", "posterior_std"):
        print(f"{name:14s} {' '.join(f'{value:.4f}' for value in found[name])}")
    print(f"latent_absmax  {found['latent_absmax']:.2f} (scaled means)")
    for line in _classes(manifest.class_names, found["class_counts"]):
        print(line)
    length = manifest.text.length if manifest.text else 0
    for column in manifest.text.columns if manifest.text else ():
        numbers = found[column]
        words, tokens = (
            f"{np.min(x)} / {np.median(x):.0f} / {np.max(x)}" for x in (numbers["words"], numbers["tokens"])
        )
        print(
            f"caption        {column}: words {words}, tokens {tokens} of {length} (least / median / "
            f"most); {100 * numbers['truncated']:.1f} % fill them all"
        )
    if manifest.text:
        encoder = f"; {manifest.text.layer} states of {manifest.text.encoder}" if manifest.text.encoder else ""
        print(f"tokenizer      {manifest.text.tokenizer} ({manifest.text.fingerprint[:12]}){encoder}")
    return 0


def _classes(names: Sequence[str], counts: np.ndarray) -> list[str]:
    if len(names) <= MANY_CLASSES:
        return [f"class {label:<8d} {counts[label]} {name}" for label, name in enumerate(names)]
    return [
        f"classes        {len(names)}: {counts.min()} / {np.median(counts):.0f} / {counts.max()} images each "
        f"(least / median / most), {(counts == 0).sum()} without any"
    ]


def _show(store: LatentStore, args) -> int:
    if not len(store):
        raise InputError(f"latent store {store.path}: holds no image yet")
    if args.out.suffix.lower() != SUFFIX:
        raise InputError(f"--out={args.out}: give the name of a PNG file, such as sheet.png")
    check_file(args.out, "--out")
    autoencoder = flags.load_autoencoder(args)
    check_autoencoder(store, autoencoder)
    indices = np.sort(np.random.default_rng(args.seed).permutation(len(store))[: args.count])
    records = [store[int(index)] for index in indices]
    # One at a time: a sheet is small, and an image of any size fits.
    images = [np.asarray(_decode(autoencoder, record.mean[int(args.mirrored)])) for record in records]
    titles = [_title(store, int(index), record) for index, record in zip(indices, records, strict=True)]
    pixels = [np.round((image.clip(-1, 1) + 1) * 127.5).astype(np.uint8) for image in images]
    write_picture(args.out, sheet(pixels, titles, args.columns))
    print(f"{args.out}: records {', '.join(map(str, indices))}")
    return 0


@jax.jit
def _decode(autoencoder: autoencoders.Autoencoder, mean: jax.Array) -> jax.Array:
    """Raw (h, w, C) -> (H, W, 3)."""
    return autoencoder.decode(autoencoder.scale(mean[None].astype(np.float32)))[0]


def _title(store: LatentStore, index: int, record) -> str:
    name = f"{index}: {store.class_names[record.label]}" if store.num_classes > 1 else f"{index}: {record.key}"
    return "\n".join([name, *record.captions])


def sheet(images: Sequence[np.ndarray], titles: Sequence[str], columns: int) -> Image.Image:
    """Images (H, W, 3) uint8 in rows, each over its title, which is broken into lines."""
    scale = max(1, SMALLEST // images[0].shape[1])
    height, width = (side * scale for side in images[0].shape[:2])
    font = ImageFont.load_default(FONT)
    letters = max(8, int(width / font.getlength("n")))
    wrapped = [[line for part in title.split("\n") for line in textwrap.wrap(part, letters)[:8]] for title in titles]
    line_height = FONT + 3
    cell = width + MARGIN, height + MARGIN + line_height * max(map(len, wrapped)) + MARGIN
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (MARGIN + columns * cell[0], MARGIN + rows * cell[1]), "white")
    draw = ImageDraw.Draw(page)
    for index, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        row, column = divmod(index, columns)
        left, top = MARGIN + column * cell[0], MARGIN + row * cell[1]
        picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
        page.paste(picture, (left, top))
        draw.text((left, top + height + 2), "\n".join(lines), "black", font, spacing=line_height - FONT)
    return page


def parser() -> cli.Parser:
    """The flags of `lpl store`."""
    result = cli.Parser(__doc__, prog="lpl store")
    verbs = result.add_subparsers(dest="verb")

    def add_verb(name: str, text: str, more: str = "") -> cli.Parser:
        verb = verbs.add_parser(name, help=text, description=f"{text}\n\n    lpl store {name} stores/photos-64{more}")
        verb.add_argument("store", type=flags.path, metavar="STORE", help="folder of the latent store")
        verb.add_argument("--unfinished", action="store_true", help="also one that is still being written")
        return verb

    add_verb("verify", "checksums and every record; status 1 where something is wrong")
    stats = add_verb("stats", "classes, latents, captions, sizes")
    stats.add_argument(
        "--records",
        type=cli.count(limits.MOST_IMAGES),
        metavar="N",
        default=4096,
        help="how many to look at, drawn at random",
    )
    show = add_verb("show", "decoded images with their captions or classes on one sheet", " --out sheet.png")
    flags.add(show, "out", required=True)
    flags.add(show, "count", default=16)
    show.add_argument("--columns", type=cli.whole(1, 1000), metavar="N", default=4, help="images side by side")
    flags.add(show, "seed", default=0)
    flags.add(show, "autoencoder", default="bundled")
    flags.add(show, "autoencoder-subfolder")
    flags.add(show, "autoencoder-variant")
    show.add_argument("--mirrored", action="store_true", help="the mirror images")
    return result
