"""FasterVLM (arXiv 2412.01818): the most salient patches of each tile."""

from dataclasses import dataclass

from torch import Tensor

from llava.methods.before_llm.base import ImageTokens, Selection, take
from llava.methods.before_llm.scores import patch_saliency
from llava.methods.before_llm.tiles import first_picks, members_of_tiles, split_evenly
from llava.methods.before_llm.zoom import Zoom
from llava.methods.ranking import lowest_index_topk


@dataclass
class FasterVLM(Zoom):
    """Top patches of each tile by [CLS] saliency. The question is not read.

    As for all methods here, the budget is per image. It is split evenly over the tiles. In the published code the
    budget is per tile.

    crops, crop_share  encode only the most salient crops, see Zoom; by default all of them, as in the published code
    """

    reads_features = False
    reads_text = False

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        members, real, sizes = members_of_tiles(image)
        # From raster order to LLM order (padding last), so that ties go to the token that the LLM reads first.
        members = members.masked_fill(~real, len(image.patches)).sort(dim=1).values.clamp(max=len(image.patches) - 1)
        saliency = patch_saliency(image)[members].masked_fill(~real, float("-inf"))
        quota = split_evenly(budget, sizes)
        picks = lowest_index_topk(saliency, max(quota))
        return take(image, image.patches[first_picks(members, picks, quota)])
