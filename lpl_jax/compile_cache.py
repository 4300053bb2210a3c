"""Compiled programs are kept on disk, so that a run that is resumed, or a tool that is called again, need not compile.

    LPL_JAX_COMPILE_CACHE=FOLDER    keep them there; default: $XDG_CACHE_HOME/lpl_jax/compiled (~/.cache/...)
    LPL_JAX_COMPILE_CACHE=off       keep nothing
    JAX_COMPILATION_CACHE_DIR=...   jax's own settings count before ours

A program is found again by its text, jax's and XLA's versions and flags, and the kind of its devices: a cache never
changes what is computed. Programs that compile in under a second are not kept (jax's default).
"""

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

from lpl_jax.io.paths import cache_folder, to_path

VARIABLE = "LPL_JAX_COMPILE_CACHE"
OFF = "off"
# With a limit, jax drops what was not used for longest, and several processes read and write under a lock.
MAX_BYTES = 20 * 2**30


def enable(environment: MutableMapping[str, str] | None = None) -> Path | None:
    """Switch the cache on, for this process and those that it starts. Before the first program is compiled.

    Returns its folder; None where it is off, or where jax's own variable already names one.
    """
    environment = os.environ if environment is None else environment
    choice = environment.get(VARIABLE, "")
    if choice.lower() == OFF or "JAX_COMPILATION_CACHE_DIR" in environment:
        return None
    folder = to_path(choice, VARIABLE).absolute() if choice else cache_folder(environment) / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to: as before there was a cache
        return None
    settings = {"jax_compilation_cache_dir": str(folder), "jax_compilation_cache_max_size": str(MAX_BYTES)}
    for name, value in settings.items():
        environment.setdefault(name.upper(), value)
    if "jax" in sys.modules and environment is os.environ:  # it has read its environment already
        import jax

        for name, value in settings.items():
            jax.config.update(name, int(value) if name.endswith("size") else value)
    return folder
