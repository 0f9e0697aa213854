"""CDPruner (arXiv 2506.10967): patches that differ from each other and are close to the question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.common.errors import UserError
from llava.methods.before_llm.base import ImageTokens, take
from llava.methods.before_llm.greedy import GreedyInputs, GreedySelector
from llava.methods.before_llm.scores import max_cosine
from llava.methods.before_llm.similarity import cosine_matrix
from llava.methods.before_llm.tiles import first_picks, members_of_tiles, split_evenly

# A patch adds no diversity when less than this share of it is left after the chosen ones are projected out. Exact
# arithmetic would leave 0 and single precision leaves about 1e-6. Before the rank is used up, 1e-2 and more is left.
VANISHED = 1e-5


def most_diverse(similarity: Tensor, relevance: Tensor, real: Tensor, count: int) -> Tensor:
    """Return `count` patches of each tile in the order of choice, [T, count].

    This is greedy MAP of the determinantal point process with the kernel diag(relevance) similarity diag(relevance), by
    incremental Cholesky (arXiv 1709.05135).
    similarity [T, M, M] float32; relevance [T, M] >= 0; real [T, M]. Where the rank of a tile's kernel is used up, all
    remaining patches lie in the span of the chosen ones, and relevance alone decides. A tile with fewer than `count`
    patches repeats patches at the end.
    """
    tiles = torch.arange(len(similarity), device=similarity.device)
    kernel = relevance[:, :, None] * similarity * relevance[:, None, :]
    whole = kernel.diagonal(dim1=1, dim2=2)
    left, free, picks = whole.clone(), real.clone(), []
    factor = kernel.new_zeros(len(kernel), count, kernel.shape[1])  # of Cholesky: one row per choice
    for n in range(count):
        diverse = free & (left > VANISHED * whole)
        by_diversity = diverse.any(dim=1, keepdim=True)
        score = torch.where(
            by_diversity, left.masked_fill(~diverse, -torch.inf), relevance.masked_fill(~free, -torch.inf)
        )
        best = score.argmax(dim=1)
        picks.append(best)
        free.scatter_(1, best[:, None], False)
        # The new row of the Cholesky factor. Where no patch adds diversity, `left` is only rounding noise, and dividing
        # by its root would blow the row up, so the row is zero there.
        explained = (factor[tiles, :n, best][:, None] @ factor[:, :n])[:, 0]
        row = (kernel[tiles, best] - explained) / left[tiles, best, None].sqrt()
        factor[:, n] = torch.where(by_diversity, row, 0.0)
        left = left - factor[:, n].square()
    return torch.stack(picks, dim=1)


def scaled(relevance: Tensor) -> Tensor:
    """Return relevance [P] scaled to 0 .. 1 over all tiles together; all ones where all values are equal."""
    # + 1e-6: a relevance of exactly 0 would remove the patch from the kernel.
    low, high = relevance.min(), relevance.max()
    return torch.where(high > low, (relevance - low + 1e-6) / (high - low), 1.0)


@dataclass
class CDPruner(GreedySelector):
    """Determinantal point process over the projected patches, conditioned on the question; each tile on its own.

    The kernel is cosine similarity, weighted on both sides by relevance to the question. The budget is split evenly
    over the tiles. Relevance is scaled over all tiles together. Without a question all patches are equally relevant.
    The cost is one [M, M] cosine matrix per tile and O(M K^2) for K choices in a tile.

    relevance   "clip": *minus* the cosine with the question in CLIP's joint space, which is anti-correlated with
                relevance; "embeddings": the cosine with the nearest word embedding of the LLM. It is the nearest, not
                the mean over words, because most words of a prompt name nothing in the image. By default "clip" where
                text_tower is given.
    text_tower  CLIP checkpoint whose text tower and projections "clip" uses: folder or hub name
    theta       None, or 0 .. below 1: relevance r becomes exp(theta / (2 (1 - theta)) r); with 0 only diversity counts
    """

    relevance: str | None = None
    text_tower: str | None = None
    theta: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.relevance == "clip" and self.text_tower is None:
            raise UserError("option 'text_tower' is None, allowed is a CLIP checkpoint where 'relevance' is 'clip'")

    @property
    def tower_states(self) -> tuple[str, ...]:
        by_clip = (self.relevance or ("clip" if self.text_tower else "embeddings")) == "clip"
        return ("text_cosine",) if by_clip else ()

    def problem(self, image: ImageTokens, text: Tensor, budget: int) -> GreedyInputs:
        relevance = self._relevance(image, text)
        members, real, sizes = members_of_tiles(image)
        quota = split_evenly(budget, sizes)
        return GreedyInputs(
            cosine_matrix(image.features[image.patches][members]),
            real,
            (relevance[members] * real,),
            quota,
            lambda picks: take(image, image.patches[first_picks(members, picks, quota)], relevance=relevance),
        )

    def rule(
        self, similarity: Tensor, real: Tensor, relevance: Tensor, *, counts: Tensor, fewest: int, most: int
    ) -> Tensor:
        return most_diverse(similarity, relevance, real, most)

    def _relevance(self, image: ImageTokens, text: Tensor) -> Tensor:
        """Return the relevance of each patch to the question, float32 [P], at least 0."""
        if not len(text):
            relevance = torch.zeros(len(image.patches), device=image.features.device)
        elif self.tower_states:
            # nan=1.0 becomes -1, the lowest relevance: a patch that is not finite is chosen last.
            relevance = -torch.nan_to_num(image.of_patches(image.tower.text_cosine).float(), nan=1.0)
        else:
            relevance = max_cosine(image, text)
        relevance = scaled(relevance)
        if self.theta is None:
            return relevance
        # The maximum is subtracted because exp would overflow for theta near 1. A common factor changes no choice.
        return torch.exp(self.theta / (2 * (1 - self.theta)) * (relevance - relevance.max()))
