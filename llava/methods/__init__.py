"""All methods of AdaV, in three packages.

before_llm chooses which vision tokens the LLM reads. inside_llm drops vision tokens between LLM layers. kv_cache
chooses which keys and values decoding stores and reads.

    from llava.methods import SELECTORS, DROPPERS, CACHES, ImageTokens, Selection, select

Importing this package imports no torch. Each name is imported on first access.
"""

from __future__ import annotations

from importlib import import_module

_PLACES = {
    "SELECTORS": "before_llm",
    "ImageTokens": "before_llm",
    "Selection": "before_llm",
    "select": "before_llm",
    "DROPPERS": "inside_llm",
    "CACHES": "kv_cache",
}
__all__ = list(_PLACES)


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
