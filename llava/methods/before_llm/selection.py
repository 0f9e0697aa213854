"""select: runs any selector by name, with the rules that hold for all of them (budget, "keep everything", options)."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from numbers import Integral

import torch
from torch import Tensor

from llava.common.errors import UserError
from llava.methods import before_llm as package
from llava.methods.before_llm.base import ImageTokens, Selection, Selector, locate, take_all
from llava.methods.before_llm.detail import finest_patches, with_finest, without
from llava.methods.options import OPTION_RULES


def option_names(name: str) -> tuple[str, ...]:
    """Return the names of the options that the selector `name` takes (imports torch)."""
    method = _method(name)
    return tuple(f.name for f in fields(method) if f.init) if is_dataclass(method) else ()


def _method(name: str) -> type[Selector]:
    selectors = package.SELECTORS  # looked up each time: a user may have added one
    if name not in selectors:
        raise UserError(f"unknown token selection method {name!r}, allowed are {', '.join(selectors)}")
    return selectors[name]


def select(name: str, image: ImageTokens, text: Tensor, budget: int, detail_share: float = 0.0, **options) -> Selection:
    """Return the vision tokens of one image that the LLM reads.

    name:    a key of SELECTORS
    image:   the N vision tokens in LLM order; P of them are patches, the others are newline tokens
    text:    [m, D] word embeddings of the question; m may be 0
    budget:  K >= 1, vision tokens for this image, all tiles together
    detail_share: options.detail_share. Of K tokens, floor(detail_share * K) are the patches with the most
             ImageTokens.detail (patches without any are not taken for it), and the method chooses the others among
             the remaining patches. Methods that do not use the budget ignore it.
    options: options of the method (`option_names`). The caller handles the other options around the selector:
             positions, text_scope, anyres.

    K >= P keeps everything, newline tokens included, exactly as `none` does. Otherwise exactly K tokens are kept:
    patches or merged tokens, and no newline token. There are four exceptions. compat="public" rounds K down to a multiple
    of twice the number of tiles (adav) or of the number of tiles (hiprune), and HoloV's may have zero vectors among the K.
    `none` and `no_image` keep all and nothing, whatever K is, and `downsample` all of the image that was made smaller for it.
    VisionZip's published counts, where they are given, replace K. Raises UserError for an
    unknown name or option, an option out of its range, a budget that is no count, and an image without the tower states
    that the method reads.
    """
    return select_all(name, [image], [text], budget, detail_share, **options)[0]


def select_all(
    name: str, images: list[ImageTokens], texts: list[Tensor], budget: int, detail_share: float = 0.0, **options
) -> list[Selection]:
    """Return the Selection of every image of a batch, each with its own text and the same budget.

    The choices are those of `select`. Greedy methods make them for all images at the same time.
    """
    # 1. The method and its options.
    method = _method(name)
    allowed = option_names(name)
    for option in options:
        if option not in allowed:
            words = f"allowed are {', '.join(allowed)}" if allowed else "it has none"
            raise UserError(f"unknown option {option!r} of method {name!r}, {words}")
    if isinstance(budget, bool) or not isinstance(budget, Integral) or budget < 1:
        raise UserError(f"the budget of method {name!r} is {budget!r}, allowed is a whole number of at least 1")
    if not OPTION_RULES["detail_share"].test(detail_share):
        raise UserError(f"option 'detail_share' is {detail_share!r}, allowed is {OPTION_RULES['detail_share'].allowed}")
    selector = method(**options)
    # 2. The images that have more patches than the budget. `replace` copies, so the caller's images stay unchanged.
    images = [replace(image) for image in images]
    budgets = [selector.num_kept(image, budget) for image in images]
    whole = [method.uses_budget and k >= len(image.patches) for image, k in zip(images, budgets, strict=True)]
    chosen = [i for i in range(len(images)) if not whole[i]]
    for i in chosen:
        missing = [state for state in selector.tower_states if getattr(images[i].tower, state, None) is None]
        if missing:
            raise UserError(
                f"method {name!r} reads {' and '.join(missing)} of the vision tower, but ImageTokens.tower does not have it"
            )
    share = detail_share if method.uses_budget else 0.0
    if share and any(images[i].detail is None for i in chosen):
        raise UserError(
            f"option 'detail_share' is {share}, but ImageTokens.detail does not have the detail of each patch"
        )
    # 3. The choices. In training the chosen features have a gradient, so they are read again with one; merged tokens
    # carry it through the merging.
    learns = torch.is_grad_enabled()
    with torch.set_grad_enabled(learns and selector.makes_tokens):
        of_chosen = [[values[i] for i in chosen] for values in (images, texts, budgets)]
        kept = _chosen(selector, *of_chosen, share) if chosen else []
    if learns and not selector.makes_tokens:
        for i, selection in zip(chosen, kept, strict=True):
            selection.features = images[i].read(selection.indices)
    selections = iter(kept)
    return [
        locate(take_all(image) if all_ else next(selections), image) for image, all_ in zip(images, whole, strict=True)
    ]


def _chosen(
    selector: Selector, images: list[ImageTokens], texts: list[Tensor], budgets: list[int], share: float
) -> list[Selection]:
    """Return what `selector` keeps of images that have more patches than their budget. share: detail_share."""
    if not share:
        return selector.keep_all(images, texts, budgets)
    # 1. The patches with the most detail, and what is left for the method: other patches, and a smaller budget.
    finest = finest_patches(images, budgets, share)
    left = [budget - len(tokens) for budget, (tokens, _) in zip(budgets, finest, strict=True)]
    asked = [i for i in range(len(images)) if left[i]]
    others = [without(images[i], finest[i][1]) for i in asked]
    # 2. The method's choice, in which indices are those of the whole image.
    own = iter(selector.keep_all(others, [texts[i] for i in asked], [left[i] for i in asked]) if asked else ())
    return [
        with_finest(image, tokens, next(own) if rest else None)
        for image, (tokens, _), rest in zip(images, finest, left, strict=True)
    ]
