"""Flags that several verbs have: one name, one type and one wording for the same thing everywhere.

Flags of a single verb are in its own module. A `Flag` without a type is a switch.
"""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from lpl_jax import autoencoders, distributed, limits
from lpl_jax.autoencoders import Autoencoder
from lpl_jax.errors import InputError
from lpl_jax.fields import whole
from lpl_jax.io.image_limits import MOST_BYTES, MOST_PIXELS
from lpl_jax.io.outputs import check_folder
from lpl_jax.io.paths import AnyPath, to_path
from lpl_jax.tools import cli


class Flag(NamedTuple):
    """What a flag is wherever it is."""

    type: Any
    metavar: str | None
    help: str


def path(given: str) -> AnyPath:
    """A file or folder, here or on object storage; ~ is the user's home."""
    return _path(given, remote=True)


def local_path(given: str) -> AnyPath:
    """A file or folder of this machine."""
    return _path(given, remote=False)


def _path(given: str, remote: bool) -> AnyPath:
    try:
        return to_path(cli.text(given), remote=remote)
    except InputError as error:  # argparse names the flag
        raise argparse.ArgumentTypeError(str(error)) from None


def check_out(args: argparse.Namespace, name: str = "out") -> None:
    """Raises InputError unless the folder of a flag can be written into, before any work; None is no folder."""
    if (given := getattr(args, name)) is not None:
        check_folder(given, f"--{name}")


def check_local(args: argparse.Namespace, name: str) -> None:
    """Raises InputError where a flag that may be remote in other verbs is remote."""
    to_path(getattr(args, name), f"--{name}")


MOST_HOSTS = 2**20
HOSTS, HOST = cli.whole(1, MOST_HOSTS), cli.whole(0, MOST_HOSTS - 1)
FLAGS: dict[str, Flag] = {
    # configs and runs
    "config": Flag(
        cli.text, "FILE[:ARGUMENTS]", "config, such as imagenet:256,lpl: a file here or one of the package (lpl config)"
    ),
    "workdir": Flag(path, "FOLDER", "folder of the run; quickstart, sweep: of the runs"),
    "checkpoint": Flag(cli.count(limits.STEP), "STEP", "step of the checkpoint"),
    "weights": Flag(cli.text, "NAME", "params, or the name of an average such as 0.9999"),
    "out": Flag(path, "PATH", "where results go: a folder; export, store show: or a file"),
    # images
    "images": Flag(cli.text, "SET", "folder of images, .npz or .npy; analyze: or photos, those of scikit-image"),
    "resolution": Flag(
        cli.count(limits.SIDE), "SIDE", "side of the images, pixels; others are resized and cropped to it"
    ),
    "max-pixels": Flag(cli.count(whole(1, MOST_PIXELS)), "N", "pixels of the largest image that is read"),
    "max-bytes": Flag(cli.count(whole(1, MOST_BYTES)), "N", "bytes of the largest file of an image"),
    "count": Flag(cli.count(limits.COUNT), "N", "how many images; sample: of each prompt or class"),
    "limit": Flag(
        cli.count(limits.MOST_IMAGES),
        "N",
        "largest number of: images, drawn by the seed (prepare); captions, in turn (sample)",
    ),
    "batch-size": Flag(cli.count(limits.BATCH), "N", "images at a time, over all devices"),
    "seed": Flag(cli.count(limits.SEED), "N", "every random choice follows from it"),
    # networks and samplers
    "autoencoder": Flag(cli.text, "SOURCE", "bundled, a folder in diffusers layout, a file of weights, or a hub id"),
    "autoencoder-subfolder": Flag(cli.text, "NAME", "the autoencoder's folder inside a pipeline, such as vae"),
    "autoencoder-variant": Flag(cli.text, "NAME", "which of its weights, where none are plain, such as fp16"),
    "guidance": Flag(cli.Number(limits.GUIDANCE), "SCALE", "guidance scale; 1: none"),
    "steps": Flag(cli.count(limits.SAMPLER_STEPS), "N", "steps of the sampler"),
    # several processes
    "distributed": Flag(None, None, "one of several processes; TPU pod, SLURM or Open MPI say which"),
    "coordinator": Flag(cli.text, "HOST:PORT", "or by hand: where process 0 listens"),
    "num-processes": Flag(HOSTS, "N", "number of processes, with --coordinator"),
    "process-id": Flag(HOST, "I", "number of this process from 0, with --coordinator"),
    "connect-timeout": Flag(cli.whole(1, 86_400), "SECONDS", "in which all processes must have started"),
}
PROCESSES = ("distributed", "coordinator", "num-processes", "process-id", "connect-timeout")


def add(parser, name: str, *, several: bool = False, words: Sequence[str] = (), note: str | None = None, **options):
    """Adds a flag of the table.

    several: it takes values with commas between them, or one of `words`, such as all. note: the default in words, where
    it depends on something else.
    """
    flag = FLAGS[name]
    text = flag.help if note is None else f"{flag.help} (default: {note})"
    if flag.type is None:
        parser.add_argument(f"--{name}", action="store_true", help=text, **options)
    else:
        kind = cli.Several(flag.type, words) if several else flag.type
        metavar = f"{flag.metavar}[,...]" if several else flag.metavar
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=text, **options)


def load_autoencoder(args: argparse.Namespace) -> Autoencoder:
    """What the three flags of an autoencoder name; bundled where none is given. It computes in float32."""
    where = dict(subfolder=args.autoencoder_subfolder, variant=args.autoencoder_variant)
    return autoencoders.load(args.autoencoder or "bundled", **where)


def add_config(parser: cli.Parser, **options) -> None:
    """Adds --config and what changes its fields, as `config_file.given` takes them."""
    parser.overrides = True
    text = "--config.SECTION.FIELD=VALUE changes a field of it; None, or nothing after =, leaves the field unset"
    add(parser.add_argument_group("config", text), "config", **options)


def add_processes(parser: cli.Parser) -> None:
    """Adds the flags of several processes, as `join_processes` takes them."""
    group = parser.add_argument_group("several processes (docs/scaling.md)")
    for name in PROCESSES:
        options: dict[str, Any] = {"default": 300} if name == "connect-timeout" else {}
        add(group, name, **options)


def join_processes(args: argparse.Namespace) -> None:
    """See `distributed.initialize`: before any other use of jax."""
    distributed.initialize(
        auto=args.distributed,
        coordinator=args.coordinator,
        num_processes=args.num_processes,
        process_id=args.process_id,
        timeout=args.connect_timeout,
    )
