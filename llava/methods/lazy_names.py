"""Names of a package that are imported on first access: a table of methods, and further classes.

The launcher and the configuration check method names but use no tensor. Importing torch would cost them seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from llava.methods.installed import installed, installed_classes


class LazyNames:
    """A callable for a package's `__getattr__` (PEP 562) that imports the name which is asked for.

    package: __name__ of the package
    table: name of the package's dictionary of methods, for example "SELECTORS"
    methods: method name -> "file:Class"
    others: further name -> "file:name"
    base: name in `others` of the class that methods derive from. With it, methods of installed packages belong to the
        table, too; the methods of the package itself have priority.

    After the first access a name is a plain attribute of the package. AttributeError for an unknown name.
    """

    def __init__(
        self, package: str, table: str, methods: dict[str, str], others: dict[str, str], base: str | None = None
    ):
        self._package, self._table, self._methods, self._others, self._base = package, table, methods, others, base

    @property
    def _namespace(self) -> dict:
        return vars(import_module(self._package))

    def __call__(self, name: str):
        if name == self._table:
            value = self._installed() | {method: self._load(place) for method, place in self._methods.items()}
            # The package's own methods come first in every list.
            value = {method: value[method] for method in dict.fromkeys([*self._methods, *value])}
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
        # Before the first access to the table no user can have added to it, so the static names are complete. Of an
        # installed method, only its class tells which table it belongs to.
        if self._base and installed() and self._table not in self._namespace:
            return tuple(self.table())
        return tuple(self._namespace.get(self._table, self._methods))

    def _installed(self) -> dict[str, type]:
        """Return the methods of installed packages that belong to this table."""
        if self._base is None or not installed():
            return {}
        base = self._load(self._others[self._base])
        return {
            name: method
            for name, method in installed_classes().items()
            if isinstance(method, type) and issubclass(method, base)
        }

    def _load(self, place: str) -> Callable:
        file, _, attribute = place.partition(":")
        return getattr(import_module(f"{self._package}.{file}"), attribute)
