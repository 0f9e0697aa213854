"""DivPrune (arXiv 2503.02175): patches that are as different from each other as can be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.model.token_selection.base import ImageTokens, Selection, Selector, take
from llava.model.token_selection.similarity import cosine_matrix


def farthest_points(vectors: Tensor, count: int) -> Tensor:
    """[count] distinct rows of `vectors` [P, D], in the order of choice, 1 <= count <= P.

    First the row whose nearest neighbour is farthest by cosine distance, then again and again the row whose nearest
    chosen one is farthest. Rows that are not finite come last.
    """
    similarity = cosine_matrix(vectors)
    broken = ~vectors.isfinite().all(dim=-1)
    # In similarities the farthest is the smallest: `nearest` is that of a row's nearest chosen one.
    nearest = similarity.fill_diagonal_(-1.0).amax(dim=0).masked_fill(broken, 2.0)
    picks = similarity.new_empty(count, dtype=torch.long)
    picks[0] = nearest.argmin()
    nearest = similarity[picks[0]].masked_fill(broken, 2.0)
    nearest[picks[0]] = torch.inf
    for n in range(1, count):
        picks[n] = nearest.argmin()
        nearest = torch.maximum(nearest, similarity[picks[n]])
        nearest[picks[n]] = torch.inf
    return picks


@dataclass
class DivPrune(Selector):
    """Farthest-point sampling of the projected patches, over all tiles together. Neither saliency nor question is read.

    The distance is one minus the cosine. Newline tokens are no candidates, unlike in the public code. Costs one [P, P]
    cosine matrix and K passes over a row of it.
    """

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        patches = image.patches
        return take(image, patches[farthest_points(image.features[patches], budget)])
