"""The same program as `lpl train`."""

from lpl_jax.__main__ import main

if __name__ == "__main__":
    main("train")
