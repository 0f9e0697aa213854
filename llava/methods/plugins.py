"""Methods from a file of one's own: --plugin my_selector.py makes the method "my_selector".

The file defines one class that derives from Selector or Dropper, a dataclass whose fields are the options. Registering
it imports torch. It then stands in SELECTORS or DROPPERS of this process, and every part finds it there by its name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

from llava.common.errors import UserError, first_line
from llava.methods.index import method_names

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class Plugin:
    """A method from a file. digest: ten hex digits of the file's content."""

    file: str
    digest: str


# The registered files by method name. Like SELECTORS and DROPPERS, this belongs to the process.
_REGISTERED: dict[str, Plugin] = {}


def plugin_of(method: str) -> Plugin | None:
    """Return the file that a method comes from; None for a method of no file."""
    return _REGISTERED.get(method)


def register(path: str | Path, digest: str | None = None) -> str:
    """Add the method of a file to SELECTORS or DROPPERS; return its name, the file's stem. Imports torch.

    digest: what the content must have; None allows any. A second call for an unchanged file does nothing.
    Raises UserError for a file that is no plugin, and for a name that another method has.
    """
    from llava.methods.before_llm import SELECTORS, Selector
    from llava.methods.inside_llm import DROPPERS, Dropper

    # 1. The file and its name.
    path = Path(path).resolve()
    name = path.stem
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"plugin: there is no file {path}, allowed is a Python file with one Selector or Dropper")
    if not _NAME.fullmatch(name):
        raise UserError(f'plugin {path} would be called "{name}", allowed are letters, digits and _, a letter first')
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"plugin {path} cannot be read ({error})") from None
    found = Plugin(str(path), hashlib.sha256(content).hexdigest()[:10])
    if digest not in (None, found.digest):
        raise UserError(f"{path}: has changed since the run began; start the same command again")
    before = _REGISTERED.get(name)
    if before == found:
        return name
    if name in method_names() and (before is None or before.file != found.file):
        owner = before.file if before else "AdaV or of an installed package"
        raise UserError(f'plugin {path} would be called "{name}", which is a method of {owner}; rename the file')
    # 2. Its one class.
    method = _the_method(_imported(path, name, content), path, (Selector, Dropper))
    # A file that changed may now hold the other kind.
    SELECTORS.pop(name, None)
    DROPPERS.pop(name, None)
    (SELECTORS if issubclass(method, Selector) else DROPPERS)[name] = method
    _REGISTERED[name] = found
    return name


def _imported(path: Path, name: str, content: bytes) -> ModuleType:
    """Run the file as a module. Raises UserError with the line for whatever goes wrong in it."""
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(f"adav_plugin_{name}", path))
    # Dataclasses look up the module of their class.
    sys.modules[module.__name__] = module
    try:
        # Compiled from the bytes that the digest was computed from, never from a cached .pyc.
        exec(compile(content, str(path), "exec"), vars(module))
    except Exception as error:  # a user's file may raise anything
        del sys.modules[module.__name__]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        place = f"{path}, line {line}" if line else str(path)
        raise UserError(f"{place}: cannot be imported ({type(error).__name__}: {first_line(error)})") from None
    return module


def _the_method(module: ModuleType, path: Path, bases: tuple[type, type]) -> type:
    """Return the one method class that a module defines itself, as a dataclass. Raises UserError if it is not fit."""
    allowed = "allowed is one dataclass that derives from Selector or Dropper"
    classes = [
        each
        for each in vars(module).values()
        if inspect.isclass(each) and issubclass(each, bases) and each.__module__ == module.__name__
    ]
    if len(classes) != 1:
        names = ", ".join(each.__name__ for each in classes) or "none"
        raise UserError(f"{path}: defines {len(classes)} methods ({names}), {allowed}")
    (method,) = classes
    if inspect.isabstract(method):
        missing = ", ".join(sorted(method.__abstractmethods__))
        raise UserError(
            f"{path}: class {method.__name__} does not define {missing}, which every method of its kind needs"
        )
    if "__init__" in vars(method) and "__dataclass_fields__" not in vars(method):
        raise UserError(f"{path}: class {method.__name__} has an __init__ of its own, {allowed}")
    # A class without options may leave the decorator out.
    return method if dataclasses.is_dataclass(method) else dataclasses.dataclass(method)
