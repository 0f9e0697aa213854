"""A package's names that are imported when they are first asked for: a table of methods, and the classes beside it.

The launcher and the configuration check method names without ever touching a tensor; importing torch takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module


class LazyNames:
    """What a package's `__getattr__` answers with.

    package: its __name__; table: what its dictionary of methods is called; methods: method -> "file:Class";
    others: further names -> "file:name". A name that was asked for once is a plain attribute of the package from then on.
    """

    def __init__(self, package: str, table: str, methods: dict[str, str], others: dict[str, str]):
        self._package, self._table, self._methods, self._others = package, table, methods, others

    @property
    def _namespace(self) -> dict:
        return vars(import_module(self._package))

    def __call__(self, name: str):
        if name == self._table:
            value = {method: self._load(place) for method, place in self._methods.items()}
        elif name in self._others:
            value = self._load(self._others[name])
        else:
            raise AttributeError(f"module {self._package!r} has no attribute {name!r}")
        self._namespace[name] = value
        return value

    def table(self) -> dict[str, type]:
        """The dictionary of methods itself (imports what they import)."""
        return getattr(import_module(self._package), self._table)

    def names(self) -> tuple[str, ...]:
        """The methods' names, without importing any; what a user added to the dictionary is included."""
        return tuple(self._namespace.get(self._table, self._methods))

    def _load(self, place: str) -> Callable:
        file, _, attribute = place.partition(":")
        return getattr(import_module(f"{self._package}.{file}"), attribute)
