"""The same program as `lpl train`."""

from lpl_jax.tools.verbs import run

if __name__ == "__main__":
    run("train")
