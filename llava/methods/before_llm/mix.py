"""mix: half of the budget by text, half by saliency; AdaV (arXiv 2501.09532) without its adaptive split."""

from dataclasses import dataclass

from torch import Tensor

from llava.methods.before_llm.base import ImageTokens, Selection, Selector, take
from llava.methods.before_llm.scores import max_cosine, patch_saliency
from llava.methods.before_llm.two_lists import TwoLists, unions_of_best


@dataclass
class Mix(Selector):
    """ceil(K / 2) patches by maximum cosine with a word (no softmax), the others by [CLS] saliency.

    Where the two halves overlap, they are filled up to K like AdaV's lists. Without text, saliency alone decides.
    """

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        return self.keep_all([image], [text], [budget])[0]

    def keep_all(self, images: list[ImageTokens], texts: list[Tensor], budgets: list[int]) -> list[Selection]:
        lists = []
        for image, text, budget in zip(images, texts, budgets, strict=True):
            saliency = patch_saliency(image)
            by_text = (budget + 1) // 2 if len(text) else 0
            lists.append(TwoLists(max_cosine(image, text) if len(text) else saliency, saliency, by_text, budget))
        unions = unions_of_best(lists)
        return [take(image, image.patches[kept]) for image, (kept, _) in zip(images, unions, strict=True)]
