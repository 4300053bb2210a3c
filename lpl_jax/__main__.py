"""`python -m lpl_jax` is the program `lpl`."""

from lpl_jax.tools.verbs import run

if __name__ == "__main__":
    run()
