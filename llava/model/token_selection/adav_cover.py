"""AdaV with coverage (ours): AdaV's two lists and their split, but a patch that resembles a chosen one counts for less."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.model.token_selection.adav import best_split, sure_of
from llava.model.token_selection.base import ImageTokens, Selection, Selector, check_option, is_number, take
from llava.model.token_selection.coverage import Coverage
from llava.model.token_selection.scores import on_all_tokens, patch_saliency, text_to_image
from llava.model.token_selection.similarity import cosine_matrix

# Best mean over both demo checkpoints and 25, 10 and 5 % of the tokens on 600 validation questions each, and no better than
# AdaV within their noise: 0.8414, against 0.8408 at 0 (AdaV), 0.8397 at 0.5 and 0.8253 at 1
# (benchmarks/adav_cover_strength.py, benchmarks/results/adav_cover_strength.csv).
STRENGTH = 0.25


def covering_union(scores: list[Tensor], counts: list[int], coverage: Coverage, strength: float) -> Tensor:
    """[sum(counts)] distinct patches: counts[0] by scores[0] [P], then counts[1] by scores[1] [P].

    Each pick takes the largest score * (gain / gain before the first pick) ** strength of its list. As in AdaV, a patch
    that both lists name leaves the union short; while it is, the next patch comes from the list with the larger (value
    / values taken from it so far), ties to the first. Needs sum(counts) <= P.
    """
    unused = coverage.gain[0].clone()
    chosen = torch.zeros_like(unused, dtype=torch.bool)
    mass = [0.0, 0.0]

    def best(side: int, free: Tensor) -> tuple[Tensor, Tensor]:
        discount = torch.where(unused > 0, coverage.gain[0] / unused, 0.0).clamp(0, 1) ** strength
        return (scores[side].double() * discount).masked_fill(~free, -torch.inf).max(dim=0)

    def choose(side: int, value: Tensor, patch: Tensor) -> None:
        mass[side] = mass[side] + value
        chosen[patch] = True
        coverage.add(patch[None])

    for side, count in enumerate(counts):
        free = torch.ones_like(chosen)
        for _ in range(count):
            value, patch = best(side, free)
            free[patch] = False
            choose(side, value, patch)
    while int(chosen.sum()) < sum(counts):
        offers = [best(side, ~chosen) for side in (0, 1)]
        share = [float(value / mass[side]) if mass[side] > 0 else 0.0 for side, (value, _) in enumerate(offers)]
        side = 0 if share[0] >= share[1] else 1
        choose(side, *offers[side])
    return torch.nonzero(chosen).flatten()


@dataclass
class AdaVCover(Selector):
    """AdaV's text score, saliency and split (adav.py) with the diminishing return of facility location (coverage.py).

    The k_text patches by text score are taken first, then the k_saliency by [CLS] attention. Every pick weighs its score
    by the share of its coverage gain that is left: (gain / gain before the first pick) ** strength, over the cosine
    similarity of the projected patches of all tiles together, below zero counting as zero. A patch whose like has
    been chosen, by either list, is worth little; one that is chosen is worth nothing, so the lists do not overlap.
    With strength 0 nothing is discounted, the lists overlap, and the choice is exactly AdaV's, fill included.
    Without text, saliency alone. Costs one [P, P] cosine matrix beside AdaV's [m, P].

    min_share, temperature  as in AdaV
    strength                >= 0, of the diminishing return

    report: k_text, k_saliency, text_score [N], saliency_score [N] (NaN at newline tokens)
    """

    min_share: float = 0.25
    temperature: float = 0.01
    strength: float = STRENGTH

    def __post_init__(self):
        good = is_number(self.min_share) and 0 <= self.min_share <= 0.5
        check_option("min_share", self.min_share, good, "a number from 0 to 0.5")
        good = is_number(self.temperature) and 0 < self.temperature < float("inf")
        check_option("temperature", self.temperature, good, "a number above 0")
        good = is_number(self.strength) and 0 <= self.strength < float("inf")
        check_option("strength", self.strength, good, "a number of at least 0")

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        patches, saliency = image.patches, patch_saliency(image)
        text_score, k_text = None, 0
        if len(text):
            text_score = text_to_image(image, text, self.temperature)
            k_text = best_split(text_score, saliency, budget, sure_of(self.min_share, budget))
        coverage = Coverage(cosine_matrix(image.features[patches])[None])
        lists = [saliency if text_score is None else text_score, saliency]
        kept = covering_union(lists, [k_text, budget - k_text], coverage, self.strength)
        return take(
            image,
            patches[kept],
            k_text=k_text,
            k_saliency=budget - k_text,
            text_score=on_all_tokens(image, text_score),
            saliency_score=on_all_tokens(image, saliency),
        )
