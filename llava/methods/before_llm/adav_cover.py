"""AdaV with coverage (ours): AdaV's two lists and their split, but a patch that resembles a chosen one counts for less."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.common.transfer import to_host
from llava.methods.before_llm.adav import best_split, sure_of
from llava.methods.before_llm.base import ImageTokens, Selection, take
from llava.methods.before_llm.coverage import Coverage
from llava.methods.before_llm.greedy import GreedySelector, Problem
from llava.methods.before_llm.scores import on_all_tokens, patch_saliency, text_to_image
from llava.methods.before_llm.similarity import cosine_matrix

# Best mean over both demo checkpoints and 25, 10 and 5 % of the tokens on 600 validation questions each, and no better than
# AdaV within their noise: 0.8414, against 0.8408 at 0 (AdaV), 0.8397 at 0.5 and 0.8253 at 1
# (benchmarks/adav_cover_strength.py, benchmarks/results/adav_cover_strength.csv).
STRENGTH = 0.25


def covering_union(
    similarity: Tensor, real: Tensor, scores: Tensor, k_first: Tensor, counts: Tensor, most: int, strength: float
) -> Tensor:
    """[B, M] which patches of each image are chosen: k_first [B] by scores[:, 0], then counts - k_first by scores[:, 1].

    similarity [B, M, M]; real [B, M]; scores [B, 2, M], at least 0; counts [B], at most the real patches,
    and `most` of them.
    Each pick takes the largest score * (gain / gain before the first pick) ** strength of its list. As in AdaV, a patch
    that both lists name leaves the union short; while it is, the next patch comes from the list with the larger (value
    / values taken from it so far), ties to the first.
    """
    coverage, images = Coverage(similarity), torch.arange(len(similarity), device=similarity.device)
    unused, scores = coverage.gain.clone(), scores.double()
    chosen, last = torch.zeros_like(real), torch.zeros_like(counts)
    mass = scores.new_zeros(len(scores), 2)

    def choose(side: Tensor | None, free: Tensor, still: Tensor) -> None:
        """The best of the patches that are free [B, 2, M] in list `side` [B], or in the one that offers more, for the
        images that `still` [B] lack one. The others choose their last once more, which changes nothing."""
        nonlocal last
        discount = torch.where(unused > 0, coverage.gain / unused, 0.0).clamp(0, 1) ** strength
        value = (scores * discount[:, None]).masked_fill(~free, -torch.inf)
        best = value.argmax(dim=2)
        value = value.gather(2, best[..., None])[..., 0]
        if side is None:
            share = torch.where(mass > 0, value / mass, 0.0)
            side = (share[:, 0] < share[:, 1]).long()
        mass[images, side] += torch.where(still, value[images, side], 0.0)
        last = torch.where(still, best[images, side], last)
        chosen[images, last], free[images, side, last] = True, False
        coverage.add(last)

    free = real[:, None].repeat(1, 2, 1)  # what the first list took is free in the second
    for n in range(most):
        choose((k_first <= n).long(), free, counts > n)
    short = counts - chosen.sum(dim=1)
    for n in range(int(to_host(short.max()))):
        choose(None, (real & ~chosen)[:, None].repeat(1, 2, 1), short > n)
    return chosen


@dataclass
class AdaVCover(GreedySelector):
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

    def problem(self, image: ImageTokens, text: Tensor, budget: int) -> Problem:
        patches, saliency = image.patches, patch_saliency(image)
        text_score, k_text = None, torch.zeros(1, dtype=torch.long, device=patches.device)
        if len(text):
            text_score = text_to_image(image, text, self.temperature)
            k_text = best_split(text_score, saliency, budget, sure_of(self.min_share, budget)).reshape(1)
        report = {
            "k_text": k_text,
            "text_score": on_all_tokens(image, text_score),
            "saliency_score": on_all_tokens(image, saliency),
        }
        first = saliency if text_score is None else text_score
        real = torch.ones_like(saliency, dtype=torch.bool)[None]
        return Problem(
            cosine_matrix(image.features[patches])[None],
            real,
            (first[None], saliency[None], k_text),
            [budget],
            lambda chosen: take(image, patches[_first_true(chosen[0, : len(patches)], budget)], **report),
        )

    def keep_all(self, images: list[ImageTokens], texts: list[Tensor], budgets: list[int]) -> list[Selection]:
        selections = super().keep_all(images, texts, budgets)
        splits = to_host(torch.cat([selection.report["k_text"] for selection in selections])).tolist()
        for selection, budget, k_text in zip(selections, budgets, splits, strict=True):
            selection.report |= {"k_text": k_text, "k_saliency": budget - k_text}
        return selections

    def rule(
        self,
        similarity: Tensor,
        real: Tensor,
        first: Tensor,
        second: Tensor,
        k_first: Tensor,
        *,
        counts: Tensor,
        most: int,
    ) -> Tensor:
        scores = torch.stack([first, second], dim=1)
        return covering_union(similarity, real, scores, k_first, counts, most, self.strength)


def _first_true(chosen: Tensor, count: int) -> Tensor:
    """[count] where `chosen` [P], of which so many are True, is True, ascending."""
    return torch.sort((~chosen).int(), stable=True).indices[:count]
