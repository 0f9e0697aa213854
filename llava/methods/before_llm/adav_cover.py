"""AdaV with coverage (our variant): AdaV's lists and split, with lower scores for patches that resemble chosen ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.common.transfer import to_host
from llava.methods.before_llm.adav import best_split, guaranteed_count
from llava.methods.before_llm.base import ImageTokens, Selection, take
from llava.methods.before_llm.coverage import Coverage
from llava.methods.before_llm.greedy import GreedyInputs, GreedySelector
from llava.methods.before_llm.scores import on_all_tokens, patch_saliency, text_to_image
from llava.methods.before_llm.similarity import cosine_matrix
from llava.methods.ranking import first_true

# The strength with the best mean accuracy: both demo checkpoints, 25, 10 and 5 % of the tokens, 600 validation
# questions each. The gain over AdaV is within the noise: 0.8414, against 0.8408 at 0 (AdaV), 0.8397 at 0.5 and 0.8253
# at 1 (benchmarks/adav_cover_strength.py, benchmarks/results/adav_cover_strength.csv).
STRENGTH = 0.25


def covering_union(
    similarity: Tensor, real: Tensor, scores: Tensor, k_first: Tensor, counts: Tensor, most: int, strength: float
) -> Tensor:
    """Return a mask [B, M] of the patches that are chosen of each image.

    The first k_first [B] patches are chosen by scores[:, 0], the next counts - k_first by scores[:, 1].
    similarity [B, M, M]; real [B, M]: False in the padding; scores [B, 2, M], at least 0; counts [B]: tokens to choose,
    at most the real patches; most: the largest count.

    Each pick takes the largest score * (gain / gain before the first pick) ** strength of its list. As in AdaV, a patch
    that both lists choose leaves the union short of its count. Each missing patch then comes from the list with the
    larger (value / sum of the values taken from it so far), ties to the first list.
    """
    coverage, images = Coverage(similarity), torch.arange(len(similarity), device=similarity.device)
    # Double precision, as the gains are: rounding must not decide between equal patches.
    unused, scores = coverage.gain.clone(), scores.double()
    chosen, last = torch.zeros_like(real), torch.zeros_like(counts)
    mass = scores.new_zeros(len(scores), 2)

    def choose(side: Tensor | None, free: Tensor, still: Tensor) -> None:
        """Choose one patch in each image that `still` [B] lacks one: the best that is free [B, 2, M].

        side: the list [B]; None takes the list that offers more. Images that lack none choose their last patch again,
        which changes nothing, so the loop needs no answer from the device.
        """
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

    # 1. The two lists, one after the other. A patch that the first list took is still free in the second, as in AdaV.
    free = real[:, None].repeat(1, 2, 1)
    for n in range(most):
        choose((k_first <= n).long(), free, counts > n)
    # 2. The patches that are missing because both lists chose the same ones. This waits for the device once per batch.
    short = counts - chosen.sum(dim=1)
    for n in range(int(to_host(short.max()))):
        choose(None, (real & ~chosen)[:, None].repeat(1, 2, 1), short > n)
    return chosen


@dataclass
class AdaVCover(GreedySelector):
    """AdaV's text score, saliency and split (adav.py) with the diminishing returns of facility location (coverage.py).

    First k_text patches are chosen by text score, then k_saliency patches by [CLS] saliency. The score of a patch is
    multiplied by (gain / gain before the first pick) ** strength, the share of its coverage gain that is left. Coverage
    is the cosine similarity of the projected patches of all tiles together; values below zero count as zero. A patch
    that resembles a chosen one, of either list, is worth little. A chosen patch is worth nothing, so the lists do not
    overlap. With strength 0 nothing is discounted, the lists overlap, and the choice is exactly AdaV's, fill included.
    Without text, saliency alone decides. The cost is one [P, P] cosine matrix, in addition to AdaV's [m, P].

    min_share, temperature  as in AdaV
    strength                >= 0, exponent of the diminishing returns

    report: k_text, k_saliency, text_score [N], saliency_score [N] (NaN at newline tokens)
    """

    min_share: float = 0.25
    temperature: float = 0.01
    strength: float = STRENGTH

    def problem(self, image: ImageTokens, text: Tensor, budget: int) -> GreedyInputs:
        patches, saliency = image.patches, patch_saliency(image)
        text_score, k_text = None, torch.zeros(1, dtype=torch.long, device=patches.device)
        if len(text):
            text_score = text_to_image(image, text, self.temperature)
            k_text = best_split(text_score, saliency, budget, guaranteed_count(self.min_share, budget)).reshape(1)
        report = {
            "k_text": k_text,
            "text_score": on_all_tokens(image, text_score),
            "saliency_score": on_all_tokens(image, saliency),
        }
        first = saliency if text_score is None else text_score
        real = torch.ones_like(saliency, dtype=torch.bool)[None]
        return GreedyInputs(
            cosine_matrix(image.features[patches])[None],
            real,
            (first[None], saliency[None], k_text),
            [budget],
            lambda chosen: take(image, patches[first_true(chosen[0, : len(patches)], budget)], **report),
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
        fewest: int,
        most: int,
    ) -> Tensor:
        scores = torch.stack([first, second], dim=1)
        return covering_union(similarity, real, scores, k_first, counts, most, self.strength)
