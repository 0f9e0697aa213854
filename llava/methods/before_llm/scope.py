"""SCOPE (arXiv 2510.24214): salient patches that together cover their tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.methods.before_llm.base import ImageTokens, take
from llava.methods.before_llm.coverage import Coverage
from llava.methods.before_llm.greedy import GreedyInputs, GreedySelector
from llava.methods.before_llm.scores import patch_saliency
from llava.methods.before_llm.similarity import cosine_matrix
from llava.methods.before_llm.tiles import first_picks, members_of_tiles, split_evenly


def cover_greedily(similarity: Tensor, weight: Tensor, real: Tensor, count: int) -> Tensor:
    """Return `count` patches of each tile in the order of choice, [T, count]; each pick has the largest gain x weight.

    similarity [T, M, M] float32, zero in the padding; weight [T, M]; real [T, M]. A tile with fewer than `count`
    patches repeats patches at the end.
    """
    coverage = Coverage(similarity)
    free, picks = real.clone(), []
    for _ in range(count):
        best = (coverage.gain * weight).masked_fill(~free, -torch.inf).argmax(dim=-1)
        picks.append(best)
        free.scatter_(1, best[:, None], False)
        coverage.add(best)
    return torch.stack(picks, dim=1)


@dataclass
class Scope(GreedySelector):
    """Greedy facility location over the tower's states, weighted by [CLS] saliency; each tile on its own.

    Each pick is the patch v with the largest gain(v) * saliency(v) ** alpha. gain(v) is what v adds to the coverage of
    its tile by cosine similarity (coverage.py). The budget is split evenly over the tiles. Patches that unpadding
    removes are neither chosen nor covered. The question is not read. The cost is one [M, M] cosine matrix per tile.

    alpha  >= 0, exponent of saliency; with 0 only coverage counts
    """

    reads_features = False
    reads_text = False
    tower_states = ("hidden",)

    alpha: float = 1.0

    def problem(self, image: ImageTokens, text: Tensor, budget: int) -> GreedyInputs:
        members, real, sizes = members_of_tiles(image)
        quota = split_evenly(budget, sizes)
        states = image.of_patches(image.tower.hidden[:, 1:])[members] * real[..., None]
        # Double precision: small saliencies to a large alpha would become 0 in float32, and all patches would tie.
        weight = patch_saliency(image)[members].double() ** self.alpha
        return GreedyInputs(
            cosine_matrix(states),
            real,
            (weight,),
            quota,
            lambda picks: take(image, image.patches[first_picks(members, picks, quota)]),
        )

    def rule(self, similarity: Tensor, real: Tensor, weight: Tensor, *, counts: Tensor, most: int) -> Tensor:
        return cover_greedily(similarity, weight, real, most)
