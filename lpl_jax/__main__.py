"""The program `lpl`, also `python -m lpl_jax`."""

import sys

from lpl_jax import stopping


def main(*first: str) -> None:
    """Exits with the status of a verb. first: arguments before those of the process, such as the verb."""
    stopping.catch([*first, *sys.argv[1:]])  # before what takes longer to be imported
    from lpl_jax.tools.verbs import run

    run(*first)


if __name__ == "__main__":
    main()
