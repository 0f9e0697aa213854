"""Names of a package that are imported on first access: a table of methods, and further classes.

The launcher and the configuration check method names but use no tensor. Importing torch would cost them seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module


class LazyNames:
    """A callable for a package's `__getattr__` (PEP 562) that imports the name which is asked for.

    package: __name__ of the package
    table: name of the package's dictionary of methods, for example "SELECTORS"
    methods: method name -> "file:Class"
    others: further name -> "file:name"

    After the first access a name is a plain attribute of the package. AttributeError for an unknown name.
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
        # One object from now on: Python asks __getattr__ only for missing names. Methods that users add stay in it.
        self._namespace[name] = value
        return value

    def table(self) -> dict[str, type]:
        """Return the package's dictionary of methods, name -> class (imports torch)."""
        return getattr(import_module(self._package), self._table)

    def names(self) -> tuple[str, ...]:
        """Return the names of all methods without an import; methods that a user added are included."""
        # Before the first access to the table no user can have added to it, so the static names are complete.
        return tuple(self._namespace.get(self._table, self._methods))

    def _load(self, place: str) -> Callable:
        file, _, attribute = place.partition(":")
        return getattr(import_module(f"{self._package}.{file}"), attribute)
