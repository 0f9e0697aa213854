"""Methods that drop vision tokens between LLM layers during prefill: one file per method, chosen by name.

    from llava.methods.inside_llm import DROPPERS, make_dropper
    dropper = make_dropper("fastv", layer=3)
    dropper.schedule(n=576, overall_tokens=144, layers=32)      # vision tokens that each layer sees

Importing this package imports no torch: the launcher and the configuration check method names with `dropper_names`.
DROPPERS and the classes are imported on first access. llava/model/decoding/layer_loop.py runs the methods.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from llava.common.errors import UserError
from llava.methods.lazy_names import LazyNames

if TYPE_CHECKING:
    from llava.methods.inside_llm.base import Dropper

__all__ = ["DROPPERS", "Dropper", "dropper_names", "make_dropper"]

# method name -> file and class. A new method is one file and one line here.
_CLASSES = {
    "fastv": "fastv:FastV",
    "fitprune": "fitprune:FitPrune",
    "sparsevlm": "sparsevlm:SparseVLM",
    "pyramiddrop": "pyramiddrop:PyramidDrop",
    "dart": "dart:DART",
}


__getattr__ = _names = LazyNames(__name__, "DROPPERS", _CLASSES, {"Dropper": "base:Dropper"})


def dropper_names() -> tuple[str, ...]:
    """Return the names of all droppers without importing torch; methods that a user added to DROPPERS are included."""
    return _names.names()


def make_dropper(name: str, **options) -> Dropper:
    """Return the dropper `name` with its options.

    Raises UserError for an unknown name or option, and for option values that exclude each other.
    """
    droppers = _names.table()
    if name not in droppers:
        raise UserError(f"unknown token dropping method {name!r}, allowed are {', '.join(droppers)}")
    allowed = [f.name for f in fields(droppers[name])]
    for option in options:
        if option not in allowed:
            raise UserError(f"unknown option {option!r} of method {name!r}, allowed are {', '.join(allowed)}")
    return droppers[name](**options)
