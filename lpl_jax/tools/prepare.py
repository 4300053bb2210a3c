"""Encodes a source of images into a latent store, once, before training.

python -m lpl_jax.tools.prepare --source photos --resolution 64 --out stores/photos-64
python -m lpl_jax.tools.prepare --source IMAGENET/train --autoencoder VAE_FOLDER --resolution 256 --out stores/in256
python -m lpl_jax.tools.prepare --source tfds:imagenet2012 --split train ...
python -m lpl_jax.tools.prepare --source 'gs://BUCKET/cc12m/{00000..01242}.tar' --tokenizer CLIP_FOLDER ...

A call that was killed goes on where it was when it is repeated. Several hosts share the work: the same call on each,
with --distributed (or --coordinator ...) as for train.py, or with --host-index I --host-count N where they know nothing
of each other. All write into the same folder. See docs/data.md.
"""

from collections.abc import Sequence

from lpl_jax import autoencoders, distributed
from lpl_jax.data import TextOptions, open_source, prepare
from lpl_jax.data.caption_encoder import LAYERS
from lpl_jax.data.images import CROP_RULES
from lpl_jax.data.skips import parse_limit
from lpl_jax.data.store import DTYPES
from lpl_jax.errors import InputError
from lpl_jax.tools import cli


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    host_index, host_count = _host(args)
    columns = [key for key in (args.caption_key, args.second_caption_key) if key is not None]
    if args.second_caption_key and not args.caption_key:
        raise InputError("--second-caption-key needs --caption-key, the first one")
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
    )
    prepare(
        source,
        autoencoders.load(args.autoencoder, subfolder=args.autoencoder_subfolder),
        args.out,
        text=_text(args),
        batch_size=args.batch,
        dtype=args.dtype,
        shard_records=args.shard_records,
        read_threads=args.threads,
        host_index=host_index,
        host_count=host_count,
        max_skipped=None if args.max_skipped is None else parse_limit(args.max_skipped),
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
    distributed.initialize(
        auto=args.distributed,
        coordinator=args.coordinator,
        num_processes=args.num_processes,
        process_id=args.process_id,
        timeout=args.connect_timeout,
    )
    if (args.host_index is None) != (args.host_count is None):
        raise InputError("--host-index and --host-count: give both or none")
    if args.host_count is None:
        import jax

        return jax.process_index(), jax.process_count()
    if args.distributed or args.coordinator:
        raise InputError("--host-count with --distributed or --coordinator: these say themselves how many there are")
    return args.host_index, args.host_count


def _parser():
    parser = cli.parser("Encode images into a latent store.")
    add = parser.add_argument
    add("--source", required=True, help="photos, tfds:NAME, tar files of a webdataset, or a folder of images")
    add("--autoencoder", default="bundled", help="bundled, a folder in diffusers layout, or a hub id")
    add("--autoencoder-subfolder", help="the autoencoder's folder inside a pipeline, such as vae")
    add("--resolution", type=int, required=True, help="side of the square images in pixels")
    add("--out", required=True, help="folder of the new store, or of one to go on with")
    add("--crop", choices=CROP_RULES, help="default: random_crop for photos, else resize_center_crop")
    add("--crops", type=int, help="photos: random crops of each photograph (default: 256)")
    add("--split", help="tfds: the split (default: train)")
    add("--data-dir", help="tfds: where prepared data sets lie")
    add("--seed", type=int, default=0, help="seed of random crops and of --limit")
    add("--limit", type=int, help="encode only so many images, drawn at random; of a webdataset the first of each tar")
    add("--batch", type=int, default=64, help="images encoded at once")
    add("--dtype", choices=DTYPES, default="float16", help="type in which the moments are kept")
    add("--shard-records", type=int, default=16384, help="images per file; a webdataset makes one file of each tar")
    add("--threads", type=int, default=4, help="threads that read and decode images")
    add(
        "--max-skipped",
        help="unusable images to pass over: a number, or a share such as 1%% (default: 0; tar files: 1%%)",
    )
    text = parser.add_argument_group("captions")
    add = text.add_argument
    add(
        "--caption-key",
        help="txt (file beside the image) or field of its json; tfds: feature (default: tar files: txt)",
    )
    add("--second-caption-key", help="a second caption of each image, to be mixed in training")
    add("--tokenizer", help="bundled, a CLIP folder, or a hub id (default: that of --embed-text, else bundled)")
    add("--tokenizer-subfolder", help="its folder inside a pipeline, such as tokenizer")
    add("--tokens", type=int, default=TextOptions.length, help="numbers kept of each caption")
    add("--embed-text", help="also keep the outputs of this text tower: bundled, a CLIP folder, or a hub id")
    add("--embed-subfolder", help="its folder inside a pipeline, such as text_encoder")
    add("--embed-layer", choices=LAYERS, default=TextOptions.layer, help="states of it that are kept")
    hosts = parser.add_argument_group("several hosts")
    add = hosts.add_argument
    add("--host-index", type=int, help="number of this host from 0, with --host-count")
    add("--host-count", type=int, help="hosts that share the work and know nothing of each other")
    add("--distributed", action="store_true", help="one of several processes; the cluster says which")
    add("--coordinator", help="HOST:PORT of process 0, with --num_processes and --process_id")
    add("--num_processes", type=int, help="number of processes, with --coordinator")
    add("--process_id", type=int, help="number of this process from 0, with --coordinator")
    add("--connect_timeout", type=int, default=300, help="seconds in which all processes must have started")
    return parser


if __name__ == "__main__":
    cli.run_main(main)
