"""What is a patch worth? The scores that several methods share: [CLS] saliency, and closeness to the question.

Every function returns one float32 score for each of the P patches of an image (`ImageTokens.patches`), whatever the
dtype of the features. A patch that is not finite scores lowest and spoils no other; a zero word says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llava.methods.before_llm.base import ImageTokens

CHUNK = 1 << 23  # cosines held at once: 64 MB in double precision
# Below it float32 takes a temperature for 0; the softmax has long had one winner by then.
SMALLEST = 1e-30


def patch_saliency(image: ImageTokens) -> Tensor:
    """[P] head-mean [CLS] attention of the patches."""
    return torch.nan_to_num(image.saliency[image.patches].float(), nan=0.0)


def text_to_image(image: ImageTokens, text: Tensor, temperature: float) -> Tensor:
    """[P] the most attention that any word pays to a patch: max over words of softmax over patches of cos / temperature.

    The softmax runs over the patches of all tiles together, for each of the m >= 1 words [m, D] by itself.
    """
    best = None
    for cosines in _cosines(image, text):
        score = torch.softmax(cosines / max(temperature, SMALLEST), dim=-1).amax(0)
        best = score if best is None else torch.maximum(best, score)
    return best


def max_cosine(image: ImageTokens, text: Tensor) -> Tensor:
    """[P] cosine of a patch with the word [m >= 1, D] that is nearest to it."""
    best = None
    for cosines in _cosines(image, text):
        score = cosines.amax(0)
        best = score if best is None else torch.maximum(best, score)
    return best


def _cosines(image: ImageTokens, text: Tensor) -> Iterator[Tensor]:
    """Cosines of a few words at a time with all patches, float32 [<= m, P].

    The products are summed in double precision: in single precision a matrix product rounds the same patch
    differently in different columns, so that exact ties would not stay ties.
    """
    patches = _unit(image.features[image.patches])
    words = _unit(text.to(patches.device))
    for part in words.split(max(1, CHUNK // max(1, len(patches)))):
        yield torch.nan_to_num((part @ patches.T).float(), nan=-1.0)


def _unit(vectors: Tensor) -> Tensor:
    """[n, D] rows scaled to length one, in double precision; a zero row stays zero, a non-finite one becomes NaN."""
    vectors = vectors.double()
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def on_all_tokens(image: ImageTokens, scores: Tensor | None) -> Tensor:
    """[N] scores of the patches [P] at their place among all tokens; NaN at newline tokens (or everywhere)."""
    full = torch.full(image.tile.shape, float("nan"), dtype=torch.float32, device=image.tile.device)
    if scores is not None:
        full[image.patches] = scores
    return full
