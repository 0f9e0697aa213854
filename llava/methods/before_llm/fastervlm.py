"""FasterVLM (arXiv 2412.01818): the most salient patches of each tile."""

from dataclasses import dataclass

from torch import Tensor

from llava.methods.before_llm.base import ImageTokens, Selection, Selector, lowest_index_topk, take
from llava.methods.before_llm.scores import patch_saliency
from llava.methods.before_llm.tiles import first_picks, members_of_tiles, split_evenly


@dataclass
class FasterVLM(Selector):
    """Top patches of each tile by [CLS] attention. The question is not looked at.

    The budget is per image, as it is for all methods here, and is split over the tiles; the published code's budget
    is per tile.
    """

    reads_features = False

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        members, real, sizes = members_of_tiles(image)
        # In LLM order, so that ties go to the token that comes first there.
        members = members.masked_fill(~real, len(image.patches)).sort(dim=1).values.clamp(max=len(image.patches) - 1)
        saliency = patch_saliency(image)[members].masked_fill(~real, float("-inf"))
        quota = split_evenly(budget, sizes)
        picks = lowest_index_topk(saliency, max(quota))
        return take(image, image.patches[first_picks(members, picks, quota)])
