"""Selection of the authors' AdaV code (compat="public"), with which the published numbers were presumably made.

The code differs from the method of the paper (arXiv 2501.09532) in six ways. All are reproduced here on purpose:
1. A salient patch of tile t is looked up at index `patch + t`, although tile t begins much later. Every salient pick
   therefore lands in tile 0.
2. This lookup ignores that the crops are interleaved row by row in LLM order.
3. The guaranteed share of saliency is taken from the lists of the tiles one after another, not from one ranking. The
   share therefore goes to tile 0 and the first crops.
4. Saliency may take at most 2k patches of one tile, where k = floor(floor(K / 2) / tiles). K is therefore rounded down
   to 2 * k * tiles.
5. A token that both lists name, or that saliency names twice, is fed to the LLM twice.
6. The split maximises the product of the masses beyond the two guaranteed shares, not of the full masses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.common.errors import UserError
from llava.common.transfer import to_device
from llava.methods.before_llm.base import ImageTokens
from llava.methods.before_llm.tiles import places_in_whole_tiles
from llava.methods.ranking import lowest_index_topk


def rounded_budget(budget: int, tiles: int) -> int:
    """Return how many tokens the public code keeps of an image of `tiles` tiles (departure 4).

    UserError for a budget that it would round down to nothing.
    """
    each = budget // 2 // tiles
    if each == 0:
        raise UserError(
            f"compat='public' rounds a budget of {budget} over {tiles} tiles down to nothing, "
            f"allowed is at least {2 * tiles}"
        )
    return 2 * each * tiles


def keep_public(
    image: ImageTokens, text_score: Tensor | None, saliency: Tensor, budget: int, min_share: float
) -> tuple[Tensor, Tensor]:
    """Return (indices [2 * k * tiles] into the features, with duplicates, and k_text).

    k_text is how many of the indices were chosen by text. It is a tensor [] on the device, so nothing waits for it
    here. text_score, saliency: float32 [N] in LLM order. Without text, saliency fills the whole budget from the same
    list. Raises UserError for tokens that the public code cannot have seen (newline tokens, unpadded crops), and for a
    budget that it would round down to nothing.
    """
    # 1. The budget, rounded down as the public code rounds it (departure 4).
    per_tile = _saliency_by_tile(image, saliency)
    tiles = len(per_tile)
    total = rounded_budget(budget, tiles)
    each = total // 2 // tiles
    share = int(min_share * total)

    # 2. The order by saliency: first the guaranteed share (departure 3), then one ranking of the rest.
    top = lowest_index_topk(per_tile, 2 * each)
    values = per_tile.gather(1, top).flatten()
    # Departures 1 and 2: tile t begins at t * (patches of a tile), but the public code adds only t.
    wrong_place = (top + torch.arange(tiles, device=top.device)[:, None]).flatten()
    ranked = share + lowest_index_topk(values[share:], total)
    saliency_order = torch.cat([wrong_place[:share], wrong_place[ranked]])
    if text_score is None:
        return saliency_order, torch.zeros((), dtype=torch.long, device=saliency.device)

    # 3. The split of the tokens that no list is guaranteed (departure 6).
    text_order = lowest_index_topk(text_score, total)
    spare = total - 2 * share

    def captured(scores):  # [spare + 1]
        return torch.nn.functional.pad(scores[:spare].cumsum(0), (1, 0))

    product = captured(text_score[text_order[share:]]) * captured(values[ranked]).flip(0)
    mean = product.sqrt()
    k_text = share + (mean == mean.max()).int().argmax()  # the first of equal means
    # 4. The two orders one after the other. No token is checked for a duplicate (departure 5).
    rank = torch.arange(total, device=mean.device)
    by_saliency = saliency_order[(rank - k_text).clamp_min(0)]
    return torch.where(rank < k_text, text_order, by_saliency), k_text


def _saliency_by_tile(image: ImageTokens, saliency: Tensor) -> Tensor:
    """Return saliency [tiles, patches of a tile] in the raster order of each tile, from saliency [N] in LLM order."""
    place, tiles = places_in_whole_tiles(image)
    by_tile = torch.empty_like(saliency)
    by_tile[to_device(place, saliency.device)] = saliency
    return by_tile.view(tiles, -1)
