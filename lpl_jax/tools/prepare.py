"""Encodes a source of images into a latent store, once, before training.

python -m lpl_jax.tools.prepare --source photos --resolution 64 --out stores/photos-64
python -m lpl_jax.tools.prepare --source IMAGENET/train --autoencoder VAE_FOLDER --resolution 256 --out stores/in256
python -m lpl_jax.tools.prepare --source tfds:imagenet2012 --split train ...
"""

from collections.abc import Sequence

from lpl_jax import autoencoders
from lpl_jax.data import open_source, prepare
from lpl_jax.data.images import CROP_RULES
from lpl_jax.data.store import DTYPES
from lpl_jax.tools import cli


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    source = open_source(
        args.source,
        args.resolution,
        crop=args.crop,
        crops=args.crops,
        split=args.split,
        data_dir=args.data_dir,
        seed=args.seed,
        limit=args.limit,
    )
    options = {"batch_size": args.batch, "dtype": args.dtype, "shard_records": args.shard_records}
    prepare(source, autoencoders.load(args.autoencoder), args.out, read_threads=args.threads, **options)
    return 0


def _parser():
    parser = cli.parser("Encode images into a latent store.")
    add = parser.add_argument
    add("--source", required=True, help="photos, tfds:NAME, or a folder of class folders")
    add("--autoencoder", default="bundled", help="bundled, a folder in diffusers layout, or a hub id")
    add("--resolution", type=int, required=True, help="side of the square images in pixels")
    add("--out", required=True, help="folder of the new store")
    add("--crop", choices=CROP_RULES, help="default: random_crop for photos, else resize_center_crop")
    add("--crops", type=int, help="photos: random crops of each photograph (default: 256)")
    add("--split", help="tfds: the split (default: train)")
    add("--data-dir", help="tfds: where prepared data sets lie")
    add("--seed", type=int, default=0, help="seed of random crops and of --limit")
    add("--limit", type=int, help="encode only so many images, drawn at random")
    add("--batch", type=int, default=64, help="images encoded at once")
    add("--dtype", choices=DTYPES, default="float16", help="type in which the moments are kept")
    add("--shard-records", type=int, default=16384, help="images per file")
    add("--threads", type=int, default=4, help="threads that read and decode images")
    return parser


if __name__ == "__main__":
    cli.run_main(main)
