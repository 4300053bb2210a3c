"""The same program as `lpl eval`."""

from lpl_jax.__main__ import main

if __name__ == "__main__":
    main("eval")
