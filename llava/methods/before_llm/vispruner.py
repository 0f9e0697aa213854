"""VisPruner (arXiv 2412.01818v2): the most salient patches of each tile, and diverse ones of the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.common.rounding import floor_share
from llava.common.transfer import to_device
from llava.methods.before_llm.base import ImageTokens, take
from llava.methods.before_llm.greedy import GreedyInputs, GreedySelector
from llava.methods.before_llm.scores import patch_saliency
from llava.methods.before_llm.similarity import cosine_matrix
from llava.methods.before_llm.tiles import first_picks, members_of_tiles, split_evenly
from llava.methods.ranking import lowest_index_topk

DROPS = 8  # patches that a round drops at most


def list_lengths(length: int, wanted: int) -> list[int]:
    """Return the length of a list of `length` patches before each round of `thinned` that leaves `wanted` of them."""
    lengths = []
    while length > wanted:
        lengths.append(length)
        length -= min(DROPS, length - wanted, (length + 1) // 2)
    return lengths


def thinned(similarity: Tensor, listed: Tensor, length: Tensor, wanted: Tensor, longest: list[int]) -> Tensor:
    """Drop patches that resemble others from the list of each tile; return the patches that stay, [T, >= wanted].

    similarity [T, M, M] float32; listed [T, M]: patches, of which the first length[t] are the list; wanted [T]: how many
    of them are to stay, at least 1; they are the first wanted[t] of the result. longest: for each round, a bound on all
    lists, at least 2.

    In each round, the patches at even places of the list are compared with those at odd places. Of the even ones, up to
    DROPS are dropped: those whose cosine with the nearest odd one is largest. The new list is the rest of the even ones
    by falling cosine, then the odd ones in their order. The rule depends on every place of the list.
    """
    tiles = torch.arange(len(listed), device=listed.device)[:, None, None]
    for bound in longest:
        # 1. The two halves. For a list of odd length, the even half is one longer.
        even, odd = listed[:, 0:bound:2], listed[:, 1:bound:2]
        evens, odds = ((length + 1) // 2)[:, None], (length // 2)[:, None]
        place = torch.arange(bound, device=listed.device)
        # 2. The cosine of each even patch with the nearest odd one; places beyond the list come last.
        cosine = similarity[tiles, even[:, :, None], odd[:, None, :]]
        beyond = place[: odd.shape[1]] >= odds
        nearest = cosine.masked_fill_(beyond[:, None], -2.0).amax(dim=2)
        nearest = nearest.masked_fill(place[: even.shape[1]] >= evens, -torch.inf)
        order = lowest_index_topk(nearest, nearest.shape[1])
        # 3. The new list: the even patches that stay, and then the odd ones. A list that is done loses none.
        dropped = torch.minimum((length - wanted)[:, None].clamp(0, DROPS), evens)
        stay = evens - dropped
        source = torch.where(place < stay, place + dropped, place - stay + even.shape[1])
        listed = torch.cat([even.gather(1, order), odd], dim=1).gather(1, source.clamp(max=bound - 1))
        length = length - dropped[:, 0]
    return listed


@dataclass
class VisPruner(GreedySelector):
    """Salient patches of each tile, and patches of the remaining ones after near duplicates are dropped in rounds.

    FasterVLM's successor. Of a tile's K patches, floor(K * salient_share) are the most salient ones. The others are
    ranked by saliency, and patches that resemble others in the list are dropped, up to 8 in a round, until the budget is
    met (`thinned`). Similarity is the cosine of the tower's states. The budget is per image and split evenly over the
    tiles; in the published code it is per tile, and every image has the same 5 tiles. The public code ends with an error
    where the number of remaining patches is odd; here it may be. The question is not read. The cost is one [M, M] cosine
    matrix per tile, and in each round a pass over the cosines between the two halves.

    The order of all cosines decides who is compared with whom, so the choice is sensitive to rounding: with states in half
    precision a quarter to a third of it changes. Similarities are float32 here, whatever the dtype of the tower.

    salient_share  0 .. 1, share of the budget that is chosen by saliency alone; published: 0.5, also 0.75
    """

    reads_text = False
    reads_features = False
    tower_states = ("hidden",)

    salient_share: float = 0.5

    def problem(self, image: ImageTokens, text: Tensor, budget: int) -> GreedyInputs:
        members, real, sizes = members_of_tiles(image)
        quota = split_evenly(budget, sizes)
        states = image.of_patches(image.tower.hidden[:, 1:])[members] * real[..., None]
        return GreedyInputs(
            cosine_matrix(states),
            real,
            (patch_saliency(image)[members],),
            quota,
            lambda picks: take(image, image.patches[first_picks(members, picks, quota)]),
        )

    def rule(
        self, similarity: Tensor, real: Tensor, saliency: Tensor, *, counts: Tensor, fewest: int, most: int
    ) -> Tensor:
        order = lowest_index_topk(saliency.masked_fill(~real, -torch.inf), saliency.shape[1])
        # The salient share of every possible count, rounded down as on the host.
        shares = [floor_share(self.salient_share, count) for count in range(most + 1)]
        salient = to_device(torch.tensor(shares), counts.device)[counts]
        # The list of each tile begins after its salient patches; the padding comes last.
        place = torch.arange(order.shape[1], device=order.device)
        listed = order.gather(1, (place + salient[:, None]).clamp(max=order.shape[1] - 1))
        # No list is longer than that of the largest tile under the smallest count, until it is done.
        done, last = most - shares[most], max(1, fewest - shares[fewest])
        longest = [max(n, done) for n in list_lengths(order.shape[1] - shares[fewest], last)] if done else []
        left = thinned(similarity, listed, real.sum(dim=1) - salient, (counts - salient).clamp(min=1), longest)
        place = place[:most]
        after = (place - salient[:, None]).clamp(0, left.shape[1] - 1)
        return torch.where(place < salient[:, None], order[:, :most], left.gather(1, after))
