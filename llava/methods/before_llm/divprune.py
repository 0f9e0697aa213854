"""DivPrune (arXiv 2503.02175): patches that are as different from each other as can be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.methods.before_llm.base import ImageTokens, take
from llava.methods.before_llm.greedy import GreedySelector, Problem
from llava.methods.before_llm.similarity import cosine_matrix


def farthest_points(similarity: Tensor, real: Tensor, finite: Tensor, count: int) -> Tensor:
    """[T, count] patches of each of T sets of M, in the order of choice.

    First the one whose nearest neighbour is farthest by cosine distance, then again and again the one whose nearest
    chosen one is farthest. similarity [T, M, M] float32. Patches that are not `finite` [T, M] come last, those that are
    not `real` [T, M] only where nothing else is left; neither are anybody's neighbours.
    """
    sets = torch.arange(len(similarity), device=similarity.device)
    neighbours = similarity.masked_fill(~(real & finite)[:, None], -2.0)
    neighbours.diagonal(dim1=1, dim2=2).fill_(-1.0)
    # In similarities the farthest is the smallest. Above every cosine: 2, the last to be taken, and infinity.
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
    """Farthest-point sampling of the projected patches, over all tiles together. Neither saliency nor question is read.

    The distance is one minus the cosine. Newline tokens are no candidates, unlike in the public code. Costs one [P, P]
    cosine matrix and K passes over a row of it.
    """

    def problem(self, image: ImageTokens, text: Tensor, budget: int) -> Problem:
        patches = image.patches
        vectors = image.features[patches]
        finite = vectors.isfinite().all(dim=-1)[None]
        return Problem(
            cosine_matrix(vectors)[None],
            torch.ones_like(finite),
            (finite,),
            [budget],
            lambda picks: take(image, patches[picks[0, :budget]]),
        )

    def rule(self, similarity: Tensor, real: Tensor, finite: Tensor, *, counts: Tensor, most: int) -> Tensor:
        return farthest_points(similarity, real, finite, most)
