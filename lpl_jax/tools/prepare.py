"""Encode a source of images into a latent store, once, before training.

    lpl prepare --source photos --resolution 64 --out stores/photos-64
    lpl prepare --source IMAGENET/train --autoencoder VAE_FOLDER --resolution 256 --out stores/in256
    lpl prepare --source tfds:imagenet2012 --split train --resolution 256 --out stores/in256
    lpl prepare --source 'gs://BUCKET/cc12m/{00000..01242}.tar' --tokenizer CLIP_FOLDER --resolution 256 --out cc12m

A call that was killed resumes when it is repeated. Several hosts share the work: the same call on each,
with --distributed (or --coordinator ...), or with --host-index I --host-count N where they know nothing of each other.
All write into the same folder. See docs/data.md.
"""

from collections.abc import Sequence

from lpl_jax import distributed, limits
from lpl_jax.data import TextOptions, check_outside, open_source, prepare
from lpl_jax.data.caption_encoder import LAYERS
from lpl_jax.data.images import CROP_RULES
from lpl_jax.data.manifest import DTYPES
from lpl_jax.data.skips import parse_limit
from lpl_jax.errors import InputError
from lpl_jax.io.fingerprints import IDENTITIES
from lpl_jax.io.image_limits import ImageLimits
from lpl_jax.io.locks import only_writer
from lpl_jax.tools import cli, flags


def main(argv: Sequence[str]) -> int:
    """Arguments after the verb -> exit status."""
    args = parser().parse_args(argv)
    host_index, host_count = _host(args)
    columns = [key for key in (args.caption_key, args.second_caption_key) if key is not None]
    if args.second_caption_key and not args.caption_key:
        raise InputError("--second-caption-key needs --caption-key, the first one")
    image_limits = ImageLimits(args.max_pixels, args.max_bytes)
    max_skipped = None if args.max_skipped is None else parse_limit(args.max_skipped)
    check_outside(args.source, args.out)
    flags.check_out(args)
    # From here on, so that no other call lists the same source and loads the same weights in vain.
    with only_writer(args.out, host_index if host_count > 1 else None):
        source = open_source(
            args.source,
            args.resolution,
            crop=args.crop,
            crops=args.crops,
            split=args.split,
            data_dir=args.data_dir,
            captions=() if args.caption_key == "none" else columns or None,
            seed=args.seed,
            limit=args.limit,
            identity=args.identity,
            limits=image_limits,
        )
        prepare(
            source,
            flags.load_autoencoder(args),
            args.out,
            text=_text(args),
            batch_size=args.batch_size,
            dtype=args.dtype,
            shard_records=args.shard_records,
            read_threads=args.threads,
            host_index=host_index,
            host_count=host_count,
            max_skipped=max_skipped,
        )
    distributed.wait_for_all("prepared")
    return 0


def _text(args) -> TextOptions:
    return TextOptions(
        tokenizer=args.tokenizer or args.embed_text or TextOptions.tokenizer,
        tokenizer_subfolder=args.tokenizer_subfolder,
        length=args.tokens,
        encoder=args.embed_text,
        encoder_subfolder=args.embed_subfolder,
        layer=args.embed_layer,
    )


def _host(args) -> tuple[int, int]:
    """This host's number, and how many there are."""
    flags.join_processes(args)
    if (args.host_index is None) != (args.host_count is None):
        raise InputError("--host-index and --host-count: give both or none")
    if args.host_count is None:
        import jax

        return jax.process_index(), jax.process_count()
    if args.distributed or args.coordinator:
        raise InputError("--host-count with --distributed or --coordinator: these say themselves how many there are")
    return args.host_index, args.host_count


def parser() -> cli.Parser:
    """The flags of `lpl prepare`."""
    result = cli.Parser(__doc__, prog="lpl prepare")
    add = result.add_argument
    add("--source", type=cli.text, metavar="SOURCE", required=True,
        help="photos, tfds:NAME, tar files of a webdataset, or a folder of images")  # fmt: skip
    flags.add(result, "out", required=True)
    flags.add(result, "resolution", required=True)
    flags.add(result, "autoencoder", default="bundled")
    flags.add(result, "autoencoder-subfolder")
    flags.add(result, "autoencoder-variant")
    add("--crop", **cli.one_of(CROP_RULES),
        help="of images that are not square (default: random_crop for photos, else resize_center_crop)")  # fmt: skip
    add(
        "--crops",
        type=cli.count(limits.CROPS),
        metavar="N",
        help="photos: random crops of each photograph (default: 256)",
    )
    add("--split", type=cli.text, metavar="NAME", help="tfds: the split (default: train)")
    add("--data-dir", type=cli.text, metavar="FOLDER", help="tfds: where prepared data sets lie")
    flags.add(result, "seed", default=0)
    flags.add(result, "limit")
    flags.add(result, "batch-size", default=64)
    add("--dtype", **cli.one_of(DTYPES), default="float16", help="type in which the moments are kept")
    add("--shard-records", type=cli.whole(1, 10**7), metavar="N", default=16384,
        help="images of a file; a webdataset makes one file of each tar")  # fmt: skip
    add("--threads", type=cli.whole(1, 1024), metavar="N", default=4, help="threads that read and decode images")
    add("--identity", **cli.one_of(IDENTITIES), default="times",
        help="how files are told from others of their names: sizes and times, or content, which reads all")  # fmt: skip
    add("--max-skipped", type=cli.text, metavar="N", help="unusable images to pass over: a number, or a share such as "
        "1%% (default: 0; tar files: 1%%)")  # fmt: skip
    flags.add(result, "max-pixels", default=ImageLimits.pixels)
    flags.add(result, "max-bytes", default=ImageLimits.bytes)
    _add_captions(result.add_argument_group("captions").add_argument)
    flags.add_processes(result)
    add = result.add_argument_group("several hosts that know nothing of each other").add_argument
    add("--host-index", type=flags.HOST, metavar="I", help="number of this host from 0, with --host-count")
    add("--host-count", type=flags.HOSTS, metavar="N", help="hosts that share the work")
    return result


def _add_captions(add) -> None:
    add("--caption-key", type=cli.text, metavar="NAME", help="txt (file beside the image), field of its json, or "
        "feature of tfds; none: no captions (default: txt for tar files, else none)")  # fmt: skip
    add("--second-caption-key", type=cli.text, metavar="NAME",
        help="a second caption of each image, to be mixed in training")  # fmt: skip
    add("--tokenizer", type=cli.text, metavar="SOURCE",
        help="bundled, a CLIP folder, or a hub id (default: that of --embed-text, else bundled)")  # fmt: skip
    add("--tokenizer-subfolder", type=cli.text, metavar="NAME", help="its folder inside a pipeline, such as tokenizer")
    add(
        "--tokens",
        type=cli.count(limits.TOKENS),
        metavar="N",
        default=TextOptions.length,
        help="numbers kept of each caption",
    )
    add("--embed-text", type=cli.text, metavar="SOURCE",
        help="also keep the outputs of this text tower: bundled, a CLIP folder, or a hub id")  # fmt: skip
    add("--embed-subfolder", type=cli.text, metavar="NAME", help="its folder inside a pipeline, such as text_encoder")
    add("--embed-layer", **cli.one_of(LAYERS), default=TextOptions.layer, help="states of it that are kept")
