"""HoloV (arXiv 2510.02912): the budget is shared out over chunks of the image by [CLS] attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llava.common.transfer import to_device, to_host
from llava.methods.before_llm.base import ImageTokens, Selection, Selector, take
from llava.methods.before_llm.scores import patch_saliency
from llava.methods.ranking import first_true, lowest_index_topk

CHUNKS = 16  # of an image, whatever its size


def chunks_of(count: int) -> tuple[Tensor, Tensor]:
    """Return (members, real), both [CHUNKS, L]: `count` patches in consecutive chunks, as one padded batch on the host.

    The first count % CHUNKS chunks have one patch more than the others. L is the size of the largest chunk. `members`
    are indices of patches, 0 in the padding; `real` is False in the padding.
    """
    size, extra = divmod(count, CHUNKS)
    sizes = torch.full((CHUNKS, 1), size) + (torch.arange(CHUNKS)[:, None] < extra)
    place = torch.arange(size + (extra > 0))
    real = place < sizes
    return (sizes.cumsum(0) - sizes + place).masked_fill(~real, 0), real


def first_shares(weight: Tensor, budget: Tensor) -> Tensor:
    """Return the share [B, C] of each of C chunks in a budget, in proportion to its weight.

    weight [B, C] float64, at least 0; budget [B, 1]. Shares are rounded down, and what is left of the budget goes to
    the chunks with the largest weights, one token each. Where all weights are 0, they count as equal.
    """
    total = weight.sum(dim=1, keepdim=True)
    share = torch.where(total > 0, weight / total, 1 / weight.shape[1])
    # 1e-9: rounding must not turn a share of exactly 3 tokens into 2.
    shares = (budget * share + 1e-9).floor().long()
    order = lowest_index_topk(share, share.shape[1])
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return shares + (rank < budget - shares.sum(dim=1, keepdim=True))


def quotas(weight: Tensor, room: Tensor, budget: Tensor) -> Tensor:
    """Return how many tokens each chunk keeps, [B, C]: `first_shares`, but never more than its patches.

    weight [B, C] float64; room [B, C]: patches of each chunk; budget [B, 1], at most the sum of `room`. The surplus of a
    full chunk is shared out over the others in the same way, until the budget is used up.
    """
    quota = torch.zeros_like(room)
    # Each round uses up the budget or fills at least one chunk, so the number of rounds needs no answer of the device.
    for _ in range(weight.shape[1]):
        free = quota < room
        # Without weight in any chunk that has room, these chunks are equal; a full one must not count as one of them.
        open_weight = torch.where(free, weight, 0.0)
        open_weight = torch.where(open_weight.sum(dim=1, keepdim=True) > 0, open_weight, free.double())
        left = budget - quota.sum(dim=1, keepdim=True)
        quota = torch.minimum(quota + first_shares(open_weight, left), room)
    return quota


@dataclass
class HoloV(Selector):
    """Most salient patches of each chunk; a chunk's share of the budget follows its mean saliency.

    The patches of all tiles in LLM order are cut into 16 consecutive chunks. Each chunk keeps its most salient patches.
    A chunk cannot keep more patches than it has; the surplus goes to the others. Neither features nor question are read.
    The cost is one sort of the patches.

    The published score of a patch is saliency + 0.09 * v * mean(saliency) / mean(v), where v is the variance of its
    cosine similarities and both means are over its chunk. Only the mean of the score over the chunk is used, and there v
    cancels: 1.09 * mean(saliency) is left. So no similarity is computed here.

    compat  None, or "public": keep what the authors' code keeps. It returns the tokens chunk by chunk, within a chunk by
            falling saliency (a chunk that is kept whole stays in raster order), and it fills the surplus of full chunks
            with zero vectors at the end. These have index -1.
    """

    reads_text = False
    reads_features = False

    compat: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.makes_tokens = self.compat == "public"

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        return self.keep_all([image], [text], [budget])[0]

    def keep_all(self, images: list[ImageTokens], texts: list[Tensor], budgets: list[int]) -> list[Selection]:
        # 1. The chunks of each image.
        device = images[0].features.device
        chunks = [_Chunks.of(image) for image in images]
        weight = torch.stack([own.weight for own in chunks])
        budget = to_device(torch.tensor(budgets)[:, None], device)
        if self.compat == "public":
            shares = to_host(first_shares(weight, budget)).tolist()
            return [_public(*one) for one in zip(images, chunks, shares, strict=True)]
        # 2. Their quotas, for all images together, and the best patches of each chunk.
        room = to_device(torch.stack([own.sizes for own in chunks]), device)
        selections = []
        for image, own, quota, count in zip(images, chunks, quotas(weight, room, budget), budgets, strict=True):
            rank = torch.arange(own.order.shape[1], device=device)
            best = first_true((rank < quota[:, None]).flatten(), count)
            selections.append(take(image, image.patches[own.order.flatten()[best]]))
        return selections


class _Chunks(NamedTuple):
    """The chunks of one image. order [C, L]: their patches by falling saliency, padding last; weight [C] float64: their
    mean saliency, 0 without patches; sizes [C]: their patches, on the host.
    """

    order: Tensor
    weight: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, image: ImageTokens) -> _Chunks:
        members, real = chunks_of(len(image.on_host.patches))
        sizes = real.sum(dim=1)
        members, real, count = (to_device(part, image.features.device) for part in (members, real, sizes))
        scores = patch_saliency(image)[members]
        order = lowest_index_topk(scores.masked_fill(~real, -torch.inf), scores.shape[1])
        weight = (scores.double() * real).sum(dim=1) / count.clamp_min(1)
        return cls(members.gather(1, order), weight, sizes)


def _public(image: ImageTokens, chunks: _Chunks, shares: list[int]) -> Selection:
    """Return the Selection of the authors' code, in its order and with its zero vectors (compat="public")."""
    kept, zeros = [], 0
    for by_saliency, size, share in zip(chunks.order, chunks.sizes.tolist(), shares, strict=True):
        kept.append(by_saliency[:share] if share < size else by_saliency[:size].sort().values)
        zeros += max(0, share - size)
    indices = image.patches[torch.cat(kept)]
    features, pad = image.read(indices), torch.nn.functional.pad
    return Selection(
        pad(indices, (0, zeros), value=-1), pad(features, (0, 0, 0, zeros)), sources=[[] for _ in range(zeros)]
    )
