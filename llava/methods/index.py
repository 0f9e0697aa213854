"""Every method by the name that the key `method` of adav_configs.json has for it. Imports torch only where a class is asked for."""

from __future__ import annotations

from llava.methods.before_llm import selector_names
from llava.methods.inside_llm import dropper_names


def method_names() -> tuple[str, ...]:
    """Every value that `method` may have: selectors (before the LLM), `none` and `no_image` among them, and droppers."""
    return (*selector_names(), *dropper_names())


def method_class(name: str) -> type:
    """The selector or dropper of that name (imports torch)."""
    from llava.methods.before_llm import SELECTORS
    from llava.methods.inside_llm import DROPPERS

    return DROPPERS[name] if name in DROPPERS else SELECTORS[name]
