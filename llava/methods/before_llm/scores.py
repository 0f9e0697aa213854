"""Scores of patches that several methods share: [CLS] saliency, and closeness to the question.

The score functions return one float32 score for each of the P patches of an image (`ImageTokens.patches`), whatever
the dtype of the features. A patch that is not finite gets the lowest score and does not change the scores of others. A
word whose embedding is zero has no effect on the ranking.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llava.methods.before_llm.base import ImageTokens

CHUNK = 1 << 23  # most cosines in memory at a time: 64 MB in double precision
# A smaller temperature could become 0 in float32, and the division would give NaN. At 1e-30 the softmax already has all
# its mass on the best patch, so the limit changes no choice.
SMALLEST = 1e-30


def patch_saliency(image: ImageTokens) -> Tensor:
    """Return the [CLS] saliency of the patches, [P]: attention from [CLS], mean over heads. NaN counts as 0."""
    return torch.nan_to_num(image.saliency[image.patches].float(), nan=0.0)


def distance_from_mean(features: Tensor, is_patch: Tensor) -> Tensor:
    """Return the Euclidean distance of each patch from the mean of all patches, float32 [N]; NaN for other tokens.

    features: [N, D]; is_patch: bool [N]. It stands in for saliency where attention is no guide: a token that is unlike
    the rest of the image scores high.
    """
    patches = features[is_patch.to(features.device)].detach().float()
    distances = features.new_full((len(features),), float("nan"), dtype=torch.float32)
    distances[is_patch.to(features.device)] = (patches - patches.mean(dim=0)).norm(dim=-1)
    return distances


def text_to_image(image: ImageTokens, text: Tensor, temperature: float, patches: Tensor | None = None) -> Tensor:
    """Return AdaV's text score [P] (arXiv 2501.09532): max over words of softmax over patches of cos / temperature.

    text: embeddings [m, D] of m >= 1 words. The softmax runs over the patches of all tiles together, for each word on
    its own. patches: unit_patches(image), which questions about one image share.
    """
    best = None
    for cosines in _cosines(unit_patches(image) if patches is None else patches, text):
        score = torch.softmax(cosines / max(temperature, SMALLEST), dim=-1).amax(0)
        best = score if best is None else torch.maximum(best, score)
    return best


def max_cosine(image: ImageTokens, text: Tensor) -> Tensor:
    """Return the cosine of each patch with its nearest word, [P]. text: [m, D] with m >= 1."""
    best = None
    for cosines in _cosines(unit_patches(image), text):
        score = cosines.amax(0)
        best = score if best is None else torch.maximum(best, score)
    return best


def unit_patches(image: ImageTokens) -> Tensor:
    """Return the features of the patches, scaled to length one, float64 [P, D]."""
    # Double precision: a float32 matrix product rounds equal patches differently in different columns, so exact ties
    # would not stay ties.
    return _unit(image.features[image.patches])


def _cosines(patches: Tensor, text: Tensor) -> Iterator[Tensor]:
    """Yield the cosines of a few words at a time with all patches, float32 [<= m, P]. patches: see unit_patches."""
    words = _unit(text.to(patches.device))
    for part in words.split(max(1, CHUNK // max(1, len(patches)))):
        yield torch.nan_to_num((part @ patches.T).float(), nan=-1.0)


def _unit(vectors: Tensor) -> Tensor:
    """Return `vectors` [n, D] scaled to length one, float64; a zero row stays zero, a non-finite row becomes NaN."""
    vectors = vectors.double()
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def on_all_tokens(image: ImageTokens, scores: Tensor | None) -> Tensor:
    """Return scores of the patches [P] spread over all tokens [N]; NaN at newline tokens, or everywhere for None."""
    full = torch.full(image.tile.shape, float("nan"), dtype=torch.float32, device=image.tile.device)
    if scores is not None:
        full[image.patches] = scores
    return full
