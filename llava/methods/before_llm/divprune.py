"""DivPrune (arXiv 2503.02175): patches that are as different from each other as possible."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.methods.before_llm.base import ImageTokens, take
from llava.methods.before_llm.greedy import GreedyInputs, GreedySelector
from llava.methods.before_llm.similarity import cosine_matrix


def farthest_points(similarity: Tensor, real: Tensor, finite: Tensor, count: int) -> Tensor:
    """Return `count` patches of each of T sets of M patches, in the order of choice: [T, count].

    The first pick is the patch whose nearest neighbour is farthest by cosine distance. Each later pick is the patch
    whose nearest chosen patch is farthest. similarity [T, M, M] float32. Patches that are not `finite` [T, M] are
    picked last. Patches that are not `real` [T, M] are picked only where nothing else is left. Both are no neighbours
    of others.
    """
    # -1 is the lowest cosine, so no patch is its own nearest neighbour. -2 is lower still, for patches that are no
    # neighbours at all.
    sets = torch.arange(len(similarity), device=similarity.device)
    neighbours = similarity.masked_fill(~(real & finite)[:, None], -2.0)
    neighbours.diagonal(dim1=1, dim2=2).fill_(-1.0)
    # The farthest patch has the smallest similarity. Above every cosine: 2, which is picked last, and infinity.
    last, gone = ~finite, ~real
    nearest, picks = neighbours.amax(dim=2), []
    for _ in range(count):
        best = nearest.masked_fill(last, 2.0).masked_fill(gone, torch.inf).argmin(dim=1)
        nearest = torch.maximum(nearest, similarity[sets, best]) if picks else similarity[sets, best]
        gone = gone.scatter(1, best[:, None], True)
        picks.append(best)
    return torch.stack(picks, dim=1)


@dataclass
class DivPrune(GreedySelector):
    """Farthest-point sampling of the projected patches of all tiles together. It reads neither saliency nor question.

    The distance is one minus the cosine. Newline tokens are no candidates, unlike in the public code. The cost is one
    [P, P] cosine matrix and K passes over one of its rows.
    """

    reads_text = False

    def problem(self, image: ImageTokens, text: Tensor, budget: int) -> GreedyInputs:
        patches = image.patches
        vectors = image.features[patches]
        finite = vectors.isfinite().all(dim=-1)[None]
        return GreedyInputs(
            cosine_matrix(vectors)[None],
            torch.ones_like(finite),
            (finite,),
            [budget],
            lambda picks: take(image, patches[picks[0, :budget]]),
        )

    def rule(self, similarity: Tensor, real: Tensor, finite: Tensor, *, counts: Tensor, most: int) -> Tensor:
        return farthest_points(similarity, real, finite, most)
