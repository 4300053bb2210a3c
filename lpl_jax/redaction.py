"""Credentials stay out of messages, and out of all that is written: configs, stores, cards, logs."""

import os
import re
from collections.abc import Mapping

from lpl_jax.errors import InputError

HIDDEN = "***"
# What a URL may hold: a user with a password, and the parameters that sign it.
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:/{1,2})[^/\s'\"@]+@")
_NAMES = "x-(?:amz|goog)-[a-z-]+|awsaccesskeyid|googleaccessid|signature|sig|[a-z_-]*(?:token|secret|password|key)"
_PARAMETER = re.compile(rf"([?&](?:{_NAMES})=)[^&\s'\"]+", re.IGNORECASE)
# Tokens of the Hugging Face hub, and numbers of AWS's keys, wherever they are.
_TOKEN = re.compile(r"\b(hf_|AKIA|ASIA)[A-Za-z0-9]{16,}")
_VARIABLES = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|ACCESS_KEY|API_KEY|CREDENTIALS?)(?:_|$)")
SHORTEST = 8  # characters of a variable that is looked for: shorter ones are words


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text with every credential replaced by ***: in URLs, tokens by their form, and values of the environment."""
    for pattern in (_USER, _PARAMETER, _TOKEN):
        text = pattern.sub(lambda found: found[1] + HIDDEN + "@" * (found[0][-1] == "@"), text)
    for name, value in environment.items():
        if len(value) >= SHORTEST and _VARIABLES.search(name) and not os.path.exists(value):  # noqa: PTH110
            text = text.replace(value, HIDDEN)
    return text


def refuse_credentials(text: str, name: str) -> None:
    """Raises InputError where a URL has credentials in it: what is given here is written down.

    name: the flag or field that it was given as.
    """
    if "://" in text and (_USER.search(text) or _PARAMETER.search(text)):
        raise InputError(
            f"{name}={redact(text)} holds credentials, which would be written into the run or the store: leave them to "
            "the environment, or to the configuration files of the storage"
        )
