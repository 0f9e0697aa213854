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
    """Return k_text, how many of `budget` tokens are chosen by text, as a tensor []; for scores [B, P] a tensor [B].

    k_text is the number in [floor, budget - floor] with the largest (mass of the k_text best text scores) x (mass of
    the budget - k_text best saliencies); the smallest one on ties. The mass of tokens is the sum of their scores.
    text_score, saliency: float32 [P]. Maximising the product of the masses maximises their geometric mean. A constant
    factor on either list changes nothing. The result stays on the device, so nothing waits for it.
    """

    def captured(scores):  # [..., budget + 1]: mass of the best 0, 1, .. budget tokens
        best = scores.gather(-1, lowest_index_topk(scores, budget))
        # Summed in double precision: float32 scores then add up exactly, so equal splits compare as equal.
        return torch.nn.functional.pad(best.double().cumsum(-1), (1, 0))

    product = captured(text_score) * captured(saliency).flip(-1)  # entry k: k by text, budget - k by saliency
    product = product[..., floor : budget - floor + 1]
    # Products that are equal up to rounding are ties. Otherwise the scale of a score would decide between splits of
    # equal mass. argmax returns the first of equal values, so the smallest k_text.
    return floor + (product >= product.amax(-1, keepdim=True) * (1 - 1e-9)).int().argmax(-1)


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
        distinct = {id(image.features): image for image in images}
        saliency = {key: patch_saliency(image) for key, image in distinct.items()}
        units = {key: unit_patches(image) for key, image in distinct.items()} if any(map(len, texts)) else {}
        scores = [
            (text_to_image(image, text, self.temperature, units[key]) if len(text) else None, saliency[key])
            for key, image, text in zip((id(image.features) for image in images), images, texts, strict=True)
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
            unions = unions_of_best(self._lists(scores, budgets))
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

    def _lists(self, scores: list[tuple[Tensor | None, Tensor]], budgets: list[int]) -> list[TwoLists]:
        """Return the two lists of each image; without text both are saliency, and all tokens come from the second."""
        found = [TwoLists(saliency, saliency, 0, budget) for (_, saliency), budget in zip(scores, budgets, strict=True)]
        # Images of one size are split together, because the operations on one image are short.
        sizes = [(len(lists.second), lists.budget) for lists in found]
        for size in dict.fromkeys(sizes):
            of_size = [i for i, (text_score, _) in enumerate(scores) if sizes[i] == size and text_score is not None]
            if of_size:
                both = (torch.stack(part) for part in zip(*(scores[i] for i in of_size), strict=True))
                splits = best_split(*both, size[1], guaranteed_count(self.min_share, size[1]))
                for i, split in zip(of_size, splits.unbind(), strict=True):
                    found[i] = TwoLists(*scores[i], split, size[1])
        return found
