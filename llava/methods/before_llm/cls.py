"""cls: the most salient patches of all tiles together (the saliency half of AdaV, arXiv 2501.09532)."""

from dataclasses import dataclass

from torch import Tensor

from llava.methods.before_llm.base import ImageTokens, Selection, Selector, take
from llava.methods.before_llm.scores import patch_saliency
from llava.methods.ranking import lowest_index_topk


@dataclass
class Cls(Selector):
    """Top K patches by [CLS] saliency. The question is not read."""

    reads_features = False
    reads_text = False

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        return take(image, image.patches[lowest_index_topk(patch_saliency(image), budget)])
