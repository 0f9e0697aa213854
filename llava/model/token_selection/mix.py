"""mix: half the budget by the nearest word, half by saliency; AdaV (arXiv 2501.09532) without its adaptive split."""

from dataclasses import dataclass

from torch import Tensor

from llava.model.token_selection.base import ImageTokens, Selection, Selector, lowest_index_topk, take
from llava.model.token_selection.scores import max_cosine, patch_saliency
from llava.model.token_selection.two_lists import union_of_best


@dataclass
class Mix(Selector):
    """ceil(K / 2) patches by maximum cosine with a word (no softmax), the others by [CLS] attention.

    Where the two halves overlap they are filled up to K as AdaV's lists are. Without text, saliency alone.
    """

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        saliency = patch_saliency(image)
        if len(text):
            by_text = (budget + 1) // 2
            kept = union_of_best(max_cosine(image, text), by_text, saliency, budget - by_text)
        else:
            kept = lowest_index_topk(saliency, budget)
        return take(image, image.patches[kept])
