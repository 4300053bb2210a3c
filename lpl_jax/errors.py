"""The one exception for things that a user can mend."""


class InputError(ValueError):
    """Something given by the user cannot be used.

    The message is a single line that names what was given and what is possible. Command-line programs print it without
    a traceback and exit with status 2 (see `lpl_jax.tools.cli`).
    """
