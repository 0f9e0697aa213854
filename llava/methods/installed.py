"""Methods of installed packages: the entry-point group "adav.methods", one entry per method, "name = module:Class"."""

from __future__ import annotations

import warnings
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

from llava.common.errors import first_line

GROUP = "adav.methods"


@lru_cache(maxsize=1)
def installed() -> dict[str, EntryPoint]:
    """Return method name -> its entry point, of all installed packages. Nothing of them is imported."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


@lru_cache(maxsize=1)
def installed_classes() -> dict[str, type]:
    """Return method name -> class (imports torch). A package that cannot be imported gives a warning and no method."""
    found = {}
    for name, entry in installed().items():
        try:
            found[name] = entry.load()
        except Exception as error:  # the code of a stranger may raise anything, and other methods must go on working
            warnings.warn(f'method "{name}" of {origin(name)} cannot be imported ({first_line(error)})', stacklevel=2)
    return found


def origin(name: str) -> str | None:
    """Return the package and version that method `name` comes from; None for a method of no installed package."""
    entry = installed().get(name)
    if entry is None:
        return None
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
