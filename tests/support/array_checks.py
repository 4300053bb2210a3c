"""Shapes and dtypes that public functions state are checked while the tests run: beartype on jaxtyping's annotations.

Nothing but arrays is checked, as what users give wrongly is refused by the functions themselves, with an InputError.
That goes for arrays too: they are checked when a call has returned, so that a function's own refusal comes first.
"""

import types
import typing
from typing import Any, Union

import jaxtyping
import numpy as np
from beartype import beartype

PACKAGES = tuple(f"lpl_jax.{name}" for name in ("autoencoders", "denoisers", "diffusion", "losses"))


def install() -> None:
    """For the modules of `PACKAGES` that are imported from now on."""
    jaxtyping.install_import_hook(PACKAGES, f"{__name__}.arrays_only")


def arrays_only(function):
    """The type checker that jaxtyping is given: it gets a function that does nothing but has the signature."""
    hints = function.__annotations__
    before_the_call = hints.get("return", Any) is Any  # there is a second one, with the result, for after it
    if before_the_call or not any(map(_has_array, hints.values())):
        return function
    function.__annotations__ = {name: _or_numpy(hint) if _has_array(hint) else Any for name, hint in hints.items()}
    return beartype(function)


def _is_array(hint) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def _has_array(hint) -> bool:
    return _is_array(hint) or any(map(_has_array, typing.get_args(hint)))


def _or_numpy(hint):
    """The same, where an array of NumPy will do as one of JAX, as it does in every operation."""
    if _is_array(hint):
        return Union[hint, hint.dtype[np.ndarray, hint.dim_str]]  # noqa: UP007
    arguments = typing.get_args(hint)
    if not _has_array(hint):
        return hint
    if isinstance(hint, types.UnionType):
        return Union[tuple(map(_or_numpy, arguments))]  # noqa: UP007
    return typing.get_origin(hint)[tuple(map(_or_numpy, arguments))]
