"""Print result cards side by side and mark what differs in how they were made.

    lpl compare runs/base/evaluation/* runs/lpl/evaluation/* --out results/both

A card is what `lpl eval` leaves: the folder of an evaluation, or the card.json in it. With --out also comparison.md and
the spectra of all are written there.
"""

import sys
from collections.abc import Sequence

from lpl_jax.errors import InputError
from lpl_jax.evaluation import cards
from lpl_jax.evaluation.evaluate import read_spectra, write_spectra
from lpl_jax.io.atomic import write_text
from lpl_jax.io.paths import AnyPath, is_remote
from lpl_jax.tools import cli, flags


def parser() -> cli.Parser:
    """The flags of `lpl compare`."""
    result = cli.Parser(__doc__, prog="lpl compare")
    result.add_argument(
        "cards", nargs="+", type=flags.path, metavar="CARD", help="folder of an evaluation, or its card"
    )
    flags.add(result, "out")
    return result


def main(argv: Sequence[str]) -> int:
    """Arguments after the verb -> exit status."""
    args = parser().parse_args(argv)
    flags.check_out(args)
    folders = [path.parent if path.name == "card.json" else path for path in args.cards]
    # A pattern like RUN/evaluation/* also matches what lies beside the cards.
    if missing := [folder for folder in folders if not folder.exists()]:
        raise InputError(f"{missing[0]}: no such evaluation")
    others = [folder for folder in folders if not (folder / "card.json").is_file()]
    folders = [folder for folder in folders if folder not in others]
    notes = [f"left out, no result cards: {', '.join(folder.name for folder in others)}"] if others else []
    if runs := [folder for folder in others if (folder / cards.FOLDER).is_dir()]:
        notes.append(f"evaluations of a run lie in {runs[0] / cards.FOLDER}")
    if len(folders) < 2:
        raise InputError("; ".join(["compare needs two or more result cards: lpl compare A B ...", *notes]))
    for note in notes:
        print(note, file=sys.stderr)
    names = short_names(folders)
    found = {name: cards.read_card(folder) for name, folder in zip(names, folders, strict=True)}
    print(cards.compare(found, same=False), end="")
    text = cards.compare(found)
    if args.out:
        write_text(args.out / "comparison.md", text)
        spectra = {name: read_spectra(folder) for name, folder in zip(names, folders, strict=True)}
        if found := {name: both for name, both in spectra.items() if both is not None}:
            reference = next(iter(found.values()))[1]
            write_spectra(args.out, {name: images for name, (images, _) in found.items()}, reference)
        print(f"written to {args.out}")
    return 0


def short_names(folders: Sequence[AnyPath]) -> list[str]:
    """Names for folders: the first part of their paths that differs in all, such as the run's name.

    Where there is none: the paths without the parts at both ends that all have in common.
    """
    parts = [(folder if is_remote(folder) else folder.absolute()).parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise InputError("a card is given twice: compare needs different ones")
    alike = len({len(path) for path in parts}) == 1  # else their parts are not of the same kinds
    for column in zip(*parts, strict=True) if alike else ():
        if len(set(column)) == len(parts):
            return list(column)
    shortest = min(map(len, parts))
    start = next(i for i in range(shortest + 1) if len({path[: i + 1] for path in parts}) > 1)
    end = next(i for i in range(shortest + 1) if i == shortest - start or len({path[-1 - i :] for path in parts}) > 1)
    return ["/".join(path[start : len(path) - end]) or path[-1] for path in parts]
