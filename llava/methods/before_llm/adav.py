"""AdaV (arXiv 2501.09532): patches by saliency and by text score, with the budget split anew for each sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.common.rounding import floor_share
from llava.common.transfer import to_host
from llava.methods.before_llm.adav_public import keep_public, rounded_budget
from llava.methods.before_llm.base import ImageTokens, Selection, Selector, take
from llava.methods.before_llm.scores import on_all_tokens, patch_saliency, text_to_image, unit_patches
from llava.methods.before_llm.two_lists import TwoLists, unions_of_best
from llava.methods.ranking import lowest_index_topk


def best_split(text_score: Tensor, saliency: Tensor, budget: int, floor: int) -> Tensor:
    """Return k_text, how many of `budget` tokens are chosen by text, as a tensor [].

    k_text is the number in [floor, budget - floor] with the largest (mass of the k_text best text scores) x (mass of
    the budget - k_text best saliencies); the smallest one on ties. The mass of tokens is the sum of their scores.
    text_score, saliency: float32 [P]. Maximising the product of the masses maximises their geometric mean. A constant
    factor on either list changes nothing. The result stays on the device, so nothing waits for it.
    """

    def captured(scores):  # [budget + 1]: mass of the best 0, 1, .. budget tokens
        best = scores[lowest_index_topk(scores, budget)]
        # Summed in double precision: float32 scores then add up exactly, so equal splits compare as equal.
        return torch.nn.functional.pad(best.double().cumsum(0), (1, 0))

    product = captured(text_score) * captured(saliency).flip(0)  # entry k: k by text, budget - k by saliency
    product = product[floor : budget - floor + 1]
    # Products that are equal up to rounding are ties. Otherwise the scale of a score would decide between splits of
    # equal mass. argmax returns the first of equal values, so the smallest k_text.
    return floor + (product >= product.max() * (1 - 1e-9)).int().argmax()


def guaranteed_count(min_share: float, budget: int) -> int:
    """Return how many of `budget` tokens each of the two lists gets in any split."""
    return min(floor_share(min_share, budget), budget // 2)


@dataclass
class AdaV(Selector):
    """Self-adaptive cross-modal split (SCAR) over all tiles of an image together.

    There are two lists: the text score (max over words of the softmax over patches of cos / temperature) and [CLS]
    saliency. The split k_text + k_saliency = K maximises the product of the captured masses; each list gets at least
    floor(min_share * K) tokens. Where the lists overlap, their union is filled up to exactly K patches. Without text,
    saliency alone decides. No attention map of the LLM is needed; the cost is one [m, P] cosine matrix.

    min_share    0 .. 0.5, share of K that each list gets in any split
    temperature  > 0, of the softmax over patches
    compat       None, or "public": keep what the authors' code keeps, with its duplicates and rounding (adav_public.py)

    report: k_text, k_saliency, text_score [N], saliency_score [N] (NaN at newline tokens)
    """

    min_share: float = 0.25
    temperature: float = 0.01
    compat: str | None = None

    def num_kept(self, image: ImageTokens, budget: int) -> int:
        if self.compat != "public" or budget >= len(image.patches):
            return budget
        return rounded_budget(budget, len(image.on_host.sizes))

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        return self.keep_all([image], [text], [budget])[0]

    def keep_all(self, images: list[ImageTokens], texts: list[Tensor], budgets: list[int]) -> list[Selection]:
        # 1. Both scores of every image. Questions about one image share its features as one object.
        units = {id(image.features): image for image, text in zip(images, texts, strict=True) if len(text)}
        units = {key: unit_patches(image) for key, image in units.items()}
        scores = [
            (
                text_to_image(image, text, self.temperature, units[id(image.features)]) if len(text) else None,
                patch_saliency(image),
            )
            for image, text in zip(images, texts, strict=True)
        ]
        # 2. What is kept of each image. The splits of a batch come to the host in one copy: each copy would wait.
        if self.compat == "public":
            kept, splits = zip(
                *(
                    keep_public(image, *own, budget, self.min_share)
                    for image, own, budget in zip(images, scores, budgets, strict=True)
                ),
                strict=True,
            )
            found = list(zip(kept, to_host(torch.stack(splits)).tolist(), strict=True))
        else:
            unions = unions_of_best([self._lists(*own, budget) for own, budget in zip(scores, budgets, strict=True)])
            found = [(image.patches[kept], k_text) for image, (kept, k_text) in zip(images, unions, strict=True)]
        # 3. The selections, with both scores for the overlay and the analyses.
        return [
            take(
                image,
                kept,
                k_text=k_text,
                k_saliency=len(kept) - k_text,
                text_score=on_all_tokens(image, text_score),
                saliency_score=on_all_tokens(image, saliency),
            )
            for image, (kept, k_text), (text_score, saliency) in zip(images, found, scores, strict=True)
        ]

    def _lists(self, text_score: Tensor | None, saliency: Tensor, budget: int) -> TwoLists:
        """Return the two lists of one image; without text both are saliency, and all tokens come from the second."""
        if text_score is None:
            return TwoLists(saliency, saliency, 0, budget)
        split = best_split(text_score, saliency, budget, guaranteed_count(self.min_share, budget))
        return TwoLists(text_score, saliency, split, budget)
