"""Identities: what is equal has the same fingerprint, and nothing else has. SHA-256, hexadecimal."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict


def fingerprint(params: Mapping[str, Any]) -> str:
    """Of the parameters of a network: their names, shapes and values, as float32.

    One for all that is frozen: autoencoders, text towers, the networks of evaluations.
    """
    digest = hashlib.sha256()
    for path, array in sorted(flatten_dict(params, sep="/").items()):
        digest.update(f"{path}{array.shape}".encode())
        digest.update(np.asarray(array, np.float32).tobytes())
    return digest.hexdigest()


def fingerprint_texts(*texts: str) -> str:
    """Of some texts in their order, file names that are no UTF-8 among them."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def fingerprint_values(values: Mapping[str, Any]) -> str:
    """Of plain values by name, in any order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
