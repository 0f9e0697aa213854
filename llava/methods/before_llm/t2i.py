"""t2i: the patches that are closest to the words of the question (the text half of AdaV, arXiv 2501.09532)."""

from dataclasses import dataclass

from torch import Tensor

from llava.methods.before_llm.base import ImageTokens, Selection, Selector, take
from llava.methods.before_llm.scores import patch_saliency, text_to_image
from llava.methods.ranking import lowest_index_topk


@dataclass
class T2I(Selector):
    """Top K patches by text score, over all tiles together; without text, by saliency.

    temperature  > 0, of the softmax over patches
    """

    temperature: float = 0.01

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        score = text_to_image(image, text, self.temperature) if len(text) else patch_saliency(image)
        return take(image, image.patches[lowest_index_topk(score, budget)])
