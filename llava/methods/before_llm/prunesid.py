"""PruneSID (arXiv 2603.09480): patches in groups by principal component; each group gives up near duplicates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.common.transfer import to_device
from llava.methods.before_llm.base import ImageTokens, Selection, take
from llava.methods.before_llm.greedy import GreedyInputs, GreedySelector
from llava.methods.before_llm.scores import patch_saliency
from llava.methods.before_llm.similarity import cosine_matrix
from llava.methods.before_llm.tiles import first_picks, members_of_tiles, split_evenly
from llava.methods.ranking import first_true, lowest_index_topk

# A component counts if its share of the variance of the largest one is above this. Rounding in double precision leaves
# about 1e-16 of components that do not exist.
VANISHED = 1e-12


def component_groups(states: Tensor, real: Tensor, counts: list[int]) -> Tensor:
    """Return the principal component that each patch of each tile belongs to, [T, M].

    states [T, M, W]: the tower's states of the patches; real [T, M]; counts: components to use in each tile, at least 1.
    Where a tile has fewer, all of them are used. The patches are the variables and the W channels are the observations.
    A patch belongs to the component of its largest absolute loading. The decomposition is exact, in double precision.
    """
    # Inputs of the decomposition must be finite, so a broken state counts as 0.
    data = torch.sigmoid(torch.nan_to_num(states.double())).mT
    data = (data - data.mean(dim=1, keepdim=True)) * real[:, None]
    # The right singular vectors of the data are the eigenvectors of its Gram matrix, which has only [M, M] entries.
    variance, loadings = torch.linalg.eigh(data.mT @ data)
    used = torch.arange(max(counts))[None] < torch.tensor(counts)[:, None]
    variance, loadings = (part.flip(-1)[..., : max(counts)] for part in (variance, loadings))
    used = to_device(used, states.device) & (variance > VANISHED * variance[:, :1])
    return loadings.abs().masked_fill(~used[:, None], -1.0).argmax(dim=2)


def not_suppressed(conflict: Tensor) -> Tensor:
    """Return which patches of each tile are taken when they are visited in order, [T, M].

    conflict [T, M, M]: True where taking patch i (row) suppresses patch j (column); only j > i is read. A patch is taken
    unless a patch that was taken suppresses it.
    """
    suppressed = torch.zeros_like(conflict[:, 0])
    later = conflict.triu(1)
    for patch in range(conflict.shape[1]):
        suppressed = suppressed | (later[:, patch] & ~suppressed[:, patch : patch + 1])
    return ~suppressed


def group_quotas(winners: Tensor, members: Tensor, budget: Tensor, wanted: Tensor, largest: int) -> Tensor:
    """Return how many patches each group gives, [T, G]; together wanted[t] in tile t.

    winners, members [T, G]: patches of each group that are not suppressed, and all patches; budget [T]: what the caps
    follow; wanted [T]: patches that all groups of a tile give together, at most the budget; largest: most patches of a
    tile.

    Each group gives at least one patch. Its cap is the smallest of winners, members and 5 * ceil(budget / 64); while
    all caps together are below the budget, every cap rises by one, up to the members. The rest of the budget is shared
    out by winners: the cumulative shares are rounded, half to even. A share above its cap is cut, and what was cut goes
    to the groups with the most winners.
    """
    budget, wanted = budget[:, None], wanted[:, None]
    low = torch.minimum(members.clamp(max=1), wanted)
    # 1. The caps after n rises, for all n at once, because the device knows how many are needed and the host does not.
    cap = torch.minimum(torch.minimum(5 * ((budget + 63) // 64), members), winners)
    rises = torch.arange(largest + 1, device=members.device)
    caps = torch.minimum(cap[..., None] + rises, members[..., None])
    rise = (caps.sum(dim=1) >= budget).int().argmax(dim=1)
    cap = caps.gather(2, rise[:, None, None].expand(*cap.shape, 1))[..., 0]
    # 2. The shares. Double precision is exact here, so that halves are halves.
    spare = wanted - low.sum(dim=1, keepdim=True)
    shares = (spare * winners.cumsum(dim=1)).double() / winners.sum(dim=1, keepdim=True).clamp_min(1)
    shares = torch.nn.functional.pad(shares.round().long(), (1, 0)).diff(dim=1)
    quota = torch.minimum(low + shares, cap)
    # 3. What was cut, to the groups with the most winners first.
    order = lowest_index_topk(winners, winners.shape[1])
    room = (cap - quota).gather(1, order)
    left = wanted - quota.sum(dim=1, keepdim=True) - (room.cumsum(dim=1) - room)
    return quota.scatter_add(1, order, torch.minimum(left.clamp_min(0), room))


@dataclass
class PruneSID(GreedySelector):
    """Patches of every semantic group of a tile; within a group, near duplicates come last.

    1. Groups: K // 4 principal components of the tower's states, one group each (`component_groups`).
    2. In each group, patches are taken by falling saliency. A taken patch suppresses the others of its group whose cosine
       with it is above K / 32 * (mean cosine of two patches of the tile).
    3. Each group gives a number of patches that follows its winners, the patches that were not suppressed
       (`group_quotas`): the winners first, then the suppressed ones, each by saliency.

    K is the share of a tile, which is even over the tiles. Here the groups come from an exact decomposition, all K tokens
    are patches, and they are in LLM order. The authors' code finds the components with a randomised algorithm, so two
    runs of it differ. The dynamic budget of the paper is in neither. The question is not read. The cost is one [M, M]
    cosine matrix and one eigendecomposition of [M, M] per tile, and M steps that all tiles take together. The
    eigendecomposition makes the host wait for the device once per image.

    compat  None, or "public": as in the authors' code, [CLS] of each tile is one of its K tokens, and the tokens stand in
            the order group by group: [CLS] of the first tile and its patches; the patches of the crops, where those of
            a crop share its places in LLM order; the [CLS] tokens of the crops. [CLS] has index -1.
    """

    reads_text = False
    reads_features = False
    tower_states = ("hidden",)

    compat: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.makes_tokens = self.compat == "public"

    def problem(self, image: ImageTokens, text: Tensor, budget: int) -> GreedyInputs:
        members, real, sizes = members_of_tiles(image)
        quota = split_evenly(budget, sizes)
        states = image.of_patches(image.tower.hidden[:, 1:])[members] * real[..., None]
        groups = component_groups(states, real, [max(1, count // 4) for count in quota])

        def to_selection(picks: Tensor) -> Selection:
            if self.makes_tokens:
                return _public(image, members, picks, quota)
            return take(image, image.patches[first_picks(members, picks, quota)])

        return GreedyInputs(cosine_matrix(states), real, (patch_saliency(image)[members], groups), quota, to_selection)

    def rule(
        self,
        similarity: Tensor,
        real: Tensor,
        saliency: Tensor,
        groups: Tensor,
        *,
        counts: Tensor,
        fewest: int,
        most: int,
    ) -> Tensor:
        # 1. Patches by falling saliency. The padding comes last and is a group of its own, which gives nothing.
        order = lowest_index_topk(saliency.masked_fill(~real, -torch.inf), saliency.shape[1])
        padding = max(1, most // 4)
        group = groups.masked_fill(~real, padding).gather(1, order)
        # 2. Which patches suppress which.
        tiles = torch.arange(len(order), device=order.device)[:, None, None]
        count = real.sum(dim=1)
        others = similarity.sum(dim=(1, 2), dtype=torch.float64) - similarity.diagonal(dim1=1, dim2=2).sum(dim=1)
        bar = counts / 32 * others / (count * (count - 1)).clamp_min(1)
        alike = similarity[tiles, order[:, :, None], order[:, None, :]] > bar[:, None, None]
        taken = not_suppressed(alike & (group[:, :, None] == group[:, None, :]))
        # 3. The patches group by group: winners first, and both parts by saliency, because the sort is stable.
        ranked = torch.sort(2 * group + ~taken, dim=1, stable=True).indices
        empty = group.new_zeros(len(group), padding + 1)
        members, winners = (empty.scatter_add(1, group, one.long()) for one in (torch.ones_like(taken), taken))
        wanted = (counts - 1).clamp_min(0) if self.makes_tokens else counts
        quota = group_quotas(winners[:, :-1], members[:, :-1], counts, wanted, order.shape[1])
        # 4. The first patches of each group, as many as its quota.
        group = group.gather(1, ranked)
        rank = torch.arange(order.shape[1], device=order.device) - (members.cumsum(dim=1) - members).gather(1, group)
        kept = rank < torch.nn.functional.pad(quota, (0, 1)).gather(1, group)
        return order.gather(1, ranked.gather(1, first_true(kept, most)))


def _public(image: ImageTokens, members: Tensor, picks: Tensor, quota: list[int]) -> Selection:
    """Return the Selection of compat="public" from the picks [T, >= quota - 1] of each tile, group by group."""
    tiles = [tile for tile, count in enumerate(quota) if count]
    kept = [image.patches[members[tile, picks[tile, : quota[tile] - 1]]] for tile in tiles]
    # The patches of a crop stand, in their own order, at the places of its patches in LLM order.
    crops, places = (torch.cat([kept[0][:0], *parts]) for parts in (kept[1:], [own.sort().values for own in kept[1:]]))
    crops = crops[places.argsort()]
    patches = torch.cat([kept[0], crops])
    features = image.read(patches)
    made = image.tower.project(torch.stack([image.tower.hidden[tile, 0] for tile in tiles])).to(features)
    missing = patches.new_full((1,), -1)
    return Selection(
        torch.cat([missing, patches, missing.expand(len(tiles) - 1)]),
        torch.cat([made[:1], features, made[1:]]),
        sources=[[] for _ in tiles],
    )
