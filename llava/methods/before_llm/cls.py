"""cls: the most salient patches, over all tiles together (the other half of AdaV, arXiv 2501.09532)."""

from dataclasses import dataclass

from torch import Tensor

from llava.methods.before_llm.base import ImageTokens, Selection, Selector, lowest_index_topk, take
from llava.methods.before_llm.scores import patch_saliency


@dataclass
class Cls(Selector):
    """Top K patches by [CLS] attention. The question is not looked at."""

    reads_features = False

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        return take(image, image.patches[lowest_index_topk(patch_saliency(image), budget)])
