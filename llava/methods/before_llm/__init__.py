"""Which vision tokens the LLM gets to read: one file per method, chosen by name, before the first LLM layer.

    from llava.methods.before_llm import SELECTORS, ImageTokens, Selection, select
    selection = select("adav", image, text, budget=144)

Importing this package imports no torch: the launcher and the configuration check method names with `selector_names`
and never touch a tensor. SELECTORS and the classes are imported when they are first asked for.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING

from llava.common.errors import UserError
from llava.methods.lazy_names import LazyNames

if TYPE_CHECKING:
    from torch import Tensor

    from llava.methods.before_llm.base import ImageTokens, Selection, Selector

__all__ = [
    "SELECTORS",
    "ImageTokens",
    "Selection",
    "Selector",
    "TowerStates",
    "option_names",
    "select",
    "select_all",
    "selector_names",
]

# method name -> file and class. A new method is one file and one line here.
_CLASSES = {
    "none": "none:KeepAll",
    "no_image": "no_image:NoImage",
    "random": "random:Random",
    "cls": "cls:Cls",
    "t2i": "t2i:T2I",
    "mix": "mix:Mix",
    "fastervlm": "fastervlm:FasterVLM",
    "visionzip": "visionzip:VisionZip",
    "divprune": "divprune:DivPrune",
    "cdpruner": "cdpruner:CDPruner",
    "scope": "scope:Scope",
    "adav": "adav:AdaV",
    "adav_cover": "adav_cover:AdaVCover",
}


_base = {name: f"base:{name}" for name in ("ImageTokens", "Selection", "Selector", "TowerStates")}
__getattr__ = _names = LazyNames(__name__, "SELECTORS", _CLASSES, _base)


def selector_names() -> tuple[str, ...]:
    """Names of all selectors, without importing torch; what a user added to SELECTORS is included."""
    return _names.names()


def option_names(name: str) -> tuple[str, ...]:
    """Names of the options that the selector `name` takes (imports torch)."""
    method = _method(name)
    return tuple(f.name for f in fields(method) if f.init) if is_dataclass(method) else ()


def _method(name: str) -> type[Selector]:
    selectors = _names.table()
    if name not in selectors:
        raise UserError(f"unknown token selection method {name!r}, allowed are {', '.join(selectors)}")
    return selectors[name]


def select(name: str, image: ImageTokens, text: Tensor, budget: int, **options) -> Selection:
    """Choose the vision tokens of one image that the LLM reads.

    name:    a key of SELECTORS
    image:   the N vision tokens in LLM order; P of them are patches, the others are newline tokens
    text:    [m, D] word embeddings of the question; m may be 0
    budget:  K >= 1, vision tokens for this image, all tiles together
    options: the method's own (`option_names`); what steers the path around the selector (positions, text_scope,
             anyres) is the caller's

    K >= P keeps everything, newline tokens included, exactly as `none` does. Otherwise exactly K tokens are kept, patches
    or made from patches, and no newline token (AdaV's compat="public" alone rounds K down to a multiple of twice the
    tiles). `none` and `no_image` keep all and nothing, whatever K is; VisionZip's published counts, where they are
    given, stand in place of K.
    Raises UserError for an unknown name or option, an option out of its range, a budget that is no count, and an image
    without the tower states that the method reads.
    """
    return select_all(name, [image], [text], budget, **options)[0]


def select_all(name: str, images: list[ImageTokens], texts: list[Tensor], budget: int, **options) -> list[Selection]:
    """`select` for every image of a batch, each with its own text and the same budget: the same choices, made together
    where the method takes one patch after another."""
    import torch

    from llava.methods.before_llm.base import locate, take_all

    method = _method(name)
    allowed = option_names(name)
    for option in options:
        if option not in allowed:
            words = f"allowed are {', '.join(allowed)}" if allowed else "it has none"
            raise UserError(f"unknown option {option!r} of method {name!r}, {words}")
    if isinstance(budget, bool) or not isinstance(budget, Integral) or budget < 1:
        raise UserError(f"the budget of method {name!r} is {budget!r}, allowed is a whole number of at least 1")
    selector = method(**options)
    images = [replace(image) for image in images]  # all tensors on one device, without a change to the caller's
    budgets = [selector.tokens(image, budget) for image in images]
    whole = [method.uses_budget and k >= len(image.patches) for image, k in zip(images, budgets, strict=True)]
    chosen = [i for i in range(len(images)) if not whole[i]]
    for i in chosen:
        missing = [state for state in selector.tower_states if getattr(images[i].tower, state, None) is None]
        if missing:
            raise UserError(
                f"method {name!r} reads {' and '.join(missing)} of the vision tower, but ImageTokens.tower does not have it"
            )
    # In training a choice has no gradient, what is chosen has; tokens that a method makes carry it through the making.
    learns = torch.is_grad_enabled()
    with torch.set_grad_enabled(learns and method.makes_tokens):
        of_chosen = ([values[i] for i in chosen] for values in (images, texts, budgets))
        kept = selector.keep_all(*of_chosen) if chosen else []
    if learns and not method.makes_tokens:
        for i, selection in zip(chosen, kept, strict=True):
            selection.features = images[i].read(selection.indices)
    selections = iter(kept)
    return [
        locate(take_all(image) if all_ else next(selections), image) for image, all_ in zip(images, whole, strict=True)
    ]
