"""What each method costs by itself: its matrix products in FLOPs, and the rest of its work in elements.

One table for all methods rather than a method of each class: the rules stay free of bookkeeping, the entries can be
compared side by side, and a test runs every method under torch's flop counter, so that an entry cannot drift from its
rule unnoticed. A new method is one function and one line of SELECTOR_COSTS.

What is not a matrix product has no agreed price in FLOPs. It is listed apart, as elements that pass through
  softmax     exponentials
  sort        a sort or top-k
  greedy      rounds of a greedy choice x candidates looked at in each (an argmax and an update)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from llava.eval.model_shape import ImageCounts, ModelShape, product
from llava.model.token_selection.fastervlm import split_evenly


@dataclass(frozen=True)
class MethodCost:
    """flops: 2 x multiply-adds of matrix products. elements: kind of other work -> elements (see above)."""

    flops: int = 0
    elements: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SelectorCase:
    """What the cost of a selector depends on: one image, the words [m] that it may read, and the K tokens it keeps."""

    shape: ModelShape
    image: ImageCounts
    words: int
    kept: int
    options: dict

    @property
    def quotas(self) -> list[int]:
        """Tokens that a method which goes tile by tile keeps of each tile."""
        return split_evenly(self.kept, list(self.image.patches))

    def cosines_with_words(self) -> int:
        return product(self.words, self.shape.width, self.image.candidates)


def cosines_of_pairs(count: int, width: int) -> int:
    """FLOPs of similarity.cosine_matrix on [count, width]: the upper half in blocks of rows, the lower one copied."""
    from llava.model.token_selection.similarity import BLOCK

    return sum(product(min(BLOCK, count - start), width, count - start) for start in range(0, count, BLOCK))


def _nothing(case: SelectorCase) -> MethodCost:
    return MethodCost()


def _random(case: SelectorCase) -> MethodCost:
    return MethodCost(elements={"sort": case.image.candidates})  # a permutation


def _saliency(case: SelectorCase) -> MethodCost:
    """cls and fastervlm: a sort of [CLS] attention, which the tower gives."""
    return MethodCost(elements={"sort": case.image.candidates})


def _words(case: SelectorCase) -> MethodCost:
    """t2i: cosines [m, P], a softmax of each row, a sort."""
    elements = {"softmax": case.words * case.image.candidates, "sort": case.image.candidates}
    return MethodCost(case.cosines_with_words(), elements)


def _mix(case: SelectorCase) -> MethodCost:
    """Cosines [m, P] without a softmax, and a sort of each list."""
    return MethodCost(case.cosines_with_words(), {"sort": case.image.candidates * (2 if case.words else 1)})


def _adav(case: SelectorCase) -> MethodCost:
    """t2i's cosines and softmax, and a sort of each list; the search over splits is K + 1 products."""
    elements = {"softmax": case.words * case.image.candidates}
    return MethodCost(case.cosines_with_words(), elements | {"sort": case.image.candidates * (2 if case.words else 1)})


def _adav_cover(case: SelectorCase) -> MethodCost:
    """AdaV, and coverage over cosines [P, P]."""
    adav = _adav(case)
    pairs = cosines_of_pairs(case.image.candidates, case.shape.width)
    return MethodCost(adav.flops + pairs, adav.elements | {"greedy": case.kept * case.image.candidates})


def _divprune(case: SelectorCase) -> MethodCost:
    """Cosines [P, P], and K rounds over one row of them."""
    pairs = cosines_of_pairs(case.image.candidates, case.shape.width)
    return MethodCost(pairs, {"greedy": case.kept * case.image.candidates})


def _cdpruner(case: SelectorCase) -> MethodCost:
    """Cosines [M, M] of each tile, padded to the largest; round n of the greedy choice is a product with n columns.

    Relevance from word embeddings is a cosine matrix [m, P]. CLIP's text tower, where an option asks for it, is a model
    of its own and not counted.
    """
    tiles, largest, rounds = len(case.image.patches), max(case.image.patches), max(case.quotas)
    pairs = tiles * cosines_of_pairs(largest, case.shape.width)
    explained = sum(tiles * product(largest, n, 1) for n in range(rounds))
    default = "clip" if case.options.get("text_tower") else "embeddings"
    by_words = (case.options.get("relevance") or default) == "embeddings"
    relevance = case.cosines_with_words() if by_words else 0
    return MethodCost(pairs + explained + relevance, {"greedy": rounds * tiles * largest})


def _scope(case: SelectorCase) -> MethodCost:
    """Cosines [M, M] of each tile's tower states, padded to the largest; gains are updated lazily, row by row."""
    tiles, largest = len(case.image.patches), max(case.image.patches)
    pairs = tiles * cosines_of_pairs(largest, case.shape.tower_width)
    return MethodCost(pairs, {"greedy": max(case.quotas) * tiles * largest})


def _visionzip(case: SelectorCase) -> MethodCost:
    """Per tile: cosines of the n other patches' keys with c targets, merging as [c, n] @ [n, W], and the projector once
    more for what it makes."""
    from llava.model.token_selection.visionzip import PUBLISHED

    dominant, contextual = PUBLISHED
    if case.options.get("dominant") is not None:
        dominant, contextual = case.options["dominant"], case.options["contextual"]
    width, flops, compared = case.shape.tower_width, 0, 0
    for patches, quota in zip(case.image.patches, case.quotas, strict=True):
        if quota:
            merged = quota * contextual // (dominant + contextual)
            others = patches - (quota - merged - 1)
            flops += product(others, width // case.shape.tower_heads, merged) + product(merged, others, width)
            flops += case.shape.projected(1 + merged)
            compared += others * merged
    return MethodCost(flops, {"sort": case.image.candidates, "greedy": compared})


SELECTOR_COSTS: dict[str, Callable[[SelectorCase], MethodCost]] = {
    "none": _nothing,
    "no_image": _nothing,
    "random": _random,
    "cls": _saliency,
    "t2i": _words,
    "mix": _mix,
    "fastervlm": _saliency,
    "visionzip": _visionzip,
    "divprune": _divprune,
    "cdpruner": _cdpruner,
    "scope": _scope,
    "adav": _adav,
    "adav_cover": _adav_cover,
}
