"""The program `lpl` (also `python -m lpl_jax`): its verbs, of which only the chosen one is imported."""

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import lpl_jax
from lpl_jax import stopping, xla_flags
from lpl_jax.errors import InputError
from lpl_jax.tools import cli


class Verb(NamedTuple):
    """A module of this package with `parser() -> cli.Parser` and `main(argv) -> exit status`, and what it does.

    tuned: with XLA's flags for GPUs. kept: what is compiled is kept for the next call; not where that is measured.
    lower: what takes less memory. listens: it reads what the compiler says on stderr.
    """

    module: str
    help: str
    tuned: bool = False
    kept: bool = True
    lower: str = ""
    listens: bool = False


SMALLER = "give a smaller --batch-size"


VERBS = {
    "train": Verb(
        "train",
        "train a model, with or without the Latent Perceptual Loss",
        tuned=True,
        lower="lower --config.train.batch_size or loss.lpl_chunk, raise train.accumulate or mesh.fsdp",
    ),
    "eval": Verb(
        "evaluate",
        "evaluate checkpoints of a run, or a set of images",
        tuned=True,
        lower="lower --config.evaluation.batch_size",
    ),
    "compare": Verb("compare_cards", "result cards of evaluations side by side"),
    "sample": Verb("sample", "draw images with a trained run", lower=SMALLER),
    "prepare": Verb("prepare", "encode images into a latent store, before training", lower=SMALLER),
    "store": Verb("store", "look into a latent store: verify, stats, show"),
    "export": Verb("export", "write the weights of a run for others to read"),
    "import": Verb("import_run", "make a run from weights"),
    "parity": Verb("parity.program", "compare every frozen part with PyTorch"),
    "sweep": Verb("sweep", "the paper's experiments one after the other, with its numbers beside ours"),
    "profile": Verb("profile", "what a training step costs: operations, memory, time", kept=False, listens=True),
    "compile-check": Verb("compile_check", "what a training step takes on devices that are not there", listens=True),
    "analyze": Verb("analyze", "figures about a latent space: interp, irregularity, outliers", lower=SMALLER),
    "quickstart": Verb("quickstart", "the main job in miniature, on a CPU in minutes"),
    "config": Verb("config", "every field of a config with its meaning, or a config with all its values"),
}


def usage() -> str:
    """What `lpl` alone prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {verb.help}" for name, verb in VERBS.items())
    return (
        f"usage: lpl VERB ... | lpl VERB --help | lpl --version\n\nLatent Perceptual Loss in JAX. Verbs:\n\n{verbs}\n\n"
        "For example:\n\n  lpl quickstart\n  lpl train --config imagenet:256,lpl --workdir runs/lpl256"
    )


def verb_of(command: Sequence[str]) -> str:
    """The verb that a command with `lpl_jax.tools.X` in it is about."""
    modules = {verb.module.partition(".")[0]: name for name, verb in VERBS.items()}
    named = [word.partition("lpl_jax.tools.")[2].partition(".")[0] for word in command]
    return next((modules[name] for name in named if name in modules), "VERB")


def load(name: str):
    """The module of a verb."""
    return importlib.import_module(f"lpl_jax.tools.{VERBS[name].module}")


def main(argv: Sequence[str]) -> int | None:
    """Arguments without the program's name -> exit status."""
    name, *rest = argv or ["--help"]
    if name in ("--help", "-h", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"lpl_jax {lpl_jax.__version__}")
        return 0
    if name not in VERBS:
        raise InputError(f"lpl has no verb {name!r}{cli.answer(name, VERBS)}")
    if VERBS[name].tuned:
        xla_flags.set_for_gpu()
    if VERBS[name].kept:
        from lpl_jax import compile_cache  # here, as it imports what takes long: see `lpl_jax.stopping`

        compile_cache.enable()
    return load(name).main(rest)


def run(*first: str) -> None:
    """The program itself: exits with its status. first: arguments before those of the process, such as a verb."""
    argv = [*first, *sys.argv[1:]]
    stopping.catch(argv)
    verb = VERBS.get(argv[0]) if argv else None
    if not (cli.debugging(argv) or (verb and verb.listens)):  # libraries in C++ say in many lines what they raise, too
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        cli.run_main(main, argv, keep_programs=False, lower=verb.lower if verb else "")
    except SystemExit as end:
        if end.__cause__ is not None and not _others_wait_for(end.__cause__):
            # Threads may be compiling, or writing a checkpoint: a regular end of the interpreter would take the ground
            # from them, and they would say so.
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    stream.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise


def _others_wait_for(error: BaseException) -> bool:
    """Whether several processes have found the same mistake: then they take leave of each other."""
    jax = sys.modules.get("jax")
    return isinstance(error, InputError) and jax is not None and jax.distributed.is_initialized()
