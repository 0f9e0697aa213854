"""All methods by the name that the key `method` of adav_configs.json uses. Only `method_class` imports torch."""

from __future__ import annotations

from llava.methods.before_llm import selector_names
from llava.methods.inside_llm import dropper_names


def method_names() -> tuple[str, ...]:
    """Return every allowed value of `method`: selectors (with `none` and `no_image`), then droppers."""
    return (*selector_names(), *dropper_names())


def method_class(name: str) -> type:
    """Return the selector or dropper class of that name (imports torch). KeyError for an unknown name."""
    # Imported here: the launcher lists method names and must not wait seconds for torch.
    from llava.methods.before_llm import SELECTORS
    from llava.methods.inside_llm import DROPPERS

    return DROPPERS[name] if name in DROPPERS else SELECTORS[name]
