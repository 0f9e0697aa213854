"""What the authors' AdaV code keeps (compat="public"): the published numbers were presumably made with it.

It departs from the method in six ways, all of which are reproduced here on purpose:
1. a salient patch of tile t is looked up at `patch + t` where the t-th tile begins much later: every salient pick
   lands in the thumbnail;
2. so it does, although crops are interleaved row by row in the order that the LLM reads;
3. the list that the sure share of saliency is taken from is the tiles' lists one after another, not one ranking:
   the share goes to the thumbnail and the first crops;
4. saliency may take at most 2k patches of one tile, k = floor(floor(K / 2) / tiles), so K is rounded down to
   2 * k * tiles;
5. a token that both lists name, or saliency twice, is fed to the LLM twice;
6. the split maximises the product of what comes on top of the two sure shares, not of the full masses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.common.errors import UserError
from llava.common.transfer import to_device
from llava.methods.before_llm.base import ImageTokens
from llava.methods.ranking import lowest_index_topk


def keep_public(
    image: ImageTokens, text_score: Tensor | None, saliency: Tensor, budget: int, min_share: float
) -> tuple[Tensor, Tensor]:
    """Indices [2 * k * tiles] into the features, with duplicates, and how many of them were chosen by text: a tensor that
    holds the number, for which nobody waits here.

    text_score, saliency: float32 [N] in LLM order; without text, saliency fills the whole budget from the same list.
    Raises UserError for tokens that the public code cannot have seen (newline tokens, unpadded crops), and for a
    budget that it would round down to nothing.
    """
    per_tile = _saliency_by_tile(image, saliency)
    tiles = len(per_tile)
    each = budget // 2 // tiles
    total = 2 * each * tiles
    if total == 0:
        raise UserError(
            f"compat='public' rounds a budget of {budget} over {tiles} tiles down to nothing, "
            f"allowed is at least {2 * tiles}"
        )
    share = int(min_share * total)

    top = lowest_index_topk(per_tile, 2 * each)
    values = per_tile.gather(1, top).flatten()
    wrong_place = (top + torch.arange(tiles, device=top.device)[:, None]).flatten()
    ranked = share + lowest_index_topk(values[share:], total)
    saliency_order = torch.cat([wrong_place[:share], wrong_place[ranked]])
    if text_score is None:
        return saliency_order, torch.zeros((), dtype=torch.long, device=saliency.device)

    text_order = lowest_index_topk(text_score, total)
    spare = total - 2 * share

    def captured(scores):  # [spare + 1]
        return torch.nn.functional.pad(scores[:spare].cumsum(0), (1, 0))

    product = captured(text_score[text_order[share:]]) * captured(values[ranked]).flip(0)
    mean = product.sqrt()
    k_text = share + (mean == mean.max()).int().argmax()  # of equal ones the first
    rank = torch.arange(total, device=mean.device)
    by_saliency = saliency_order[(rank - k_text).clamp_min(0)]
    return torch.where(rank < k_text, text_order, by_saliency), k_text


def _saliency_by_tile(image: ImageTokens, saliency: Tensor) -> Tensor:
    """[tiles, patches of a tile] saliency in raster order of each tile, out of LLM order."""
    where = image.on_host
    if len(where.patches) < len(where.tile):
        raise UserError(
            "compat='public' got newline tokens, which the public code does not have; allowed is anyres='fastervlm'"
        )
    tiles, rows, columns = (int(x.max()) + 1 for x in (where.tile, where.row, where.column))
    place = (where.tile * rows + where.row) * columns + where.column
    if len(place) != tiles * rows * columns or len(place.unique()) != len(place):
        raise UserError(
            f"compat='public' got {len(place)} patches of {tiles} tiles of {rows} x {columns}, but the public code "
            "removes no padding; allowed is anyres='fastervlm'"
        )
    by_tile = torch.empty_like(saliency)
    by_tile[to_device(place, saliency.device)] = saliency
    return by_tile.view(tiles, rows * columns)
