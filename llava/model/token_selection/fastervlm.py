"""FasterVLM (arXiv 2412.01818): the most salient patches of each tile."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.model.token_selection.base import ImageTokens, Selection, Selector, lowest_index_topk, take
from llava.model.token_selection.scores import patch_saliency
from llava.model.token_selection.tiles import split_evenly


@dataclass
class FasterVLM(Selector):
    """Top patches of each tile by [CLS] attention. The question is not looked at.

    The budget is per image, as it is for all methods here, and is split over the tiles; the published code's budget
    is per tile.
    """

    reads_features = False

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        saliency, patches = patch_saliency(image), image.patches
        tile = image.tile[patches].long()
        kept = []
        for number, quota in enumerate(split_evenly(budget, torch.bincount(tile).tolist())):
            members = torch.nonzero(tile == number).flatten()
            kept.append(members[lowest_index_topk(saliency[members], quota)])
        return take(image, patches[torch.cat(kept)])
