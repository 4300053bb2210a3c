"""Names of the moving averages of the parameters."""

from lpl_jax.errors import InputError


def ema_name(decay: float) -> str:
    """Name of the average with this decay. Raises InputError outside [0, 1)."""
    if not 0 <= decay < 1:
        raise InputError(f"EMA decay is {decay!r}; it must be in [0, 1), for example 0.9999")
    return repr(float(decay))
