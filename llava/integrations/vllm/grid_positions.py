"""Positions of kept tokens under M-RoPE (arXiv 2409.12191): what a shortened prompt has of the whole prompt's positions.

A token of an image has a time, a row and a column, counted from the first token of its image. vLLM asks for the positions
of a prompt before it is known which tokens are kept, so a kept token gets them in two parts: `whole_prompt` gives that of
the first token, and `digits_of` gives its row and its column, as further columns of its embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Embeddings in half precision hold whole numbers up to 256 exactly, so a row or a column is two digits.
_BASE = 128
PLACE = 4  # columns of `digits_of`


def digits_of(row: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
    """Return row and column of each token as digits [K, PLACE]. row, column: int64 [K], below 16,384."""
    pairs = torch.stack([row // _BASE, row % _BASE, column // _BASE, column % _BASE], dim=1)
    return pairs.to(dtype)


def places_of(digits: Tensor) -> Tensor:
    """Return the rows and the columns int64 [2, K] that `digits_of` gave as digits [K, PLACE]."""
    high, low = digits.long().unflatten(1, (2, 2)).unbind(2)
    return (high * _BASE + low).T


@dataclass(frozen=True)
class WholePrompt:
    """A prompt with all tokens of its images.

    tokens    ids
    features  vLLM's records of its images and videos, moved to their places in `tokens`
    columns   for each token of the shortened prompt, the index in `tokens` of the token whose position it has; for a kept
              token of an image, that is the first token of the image
    """

    tokens: list[int]
    features: list
    columns: list[int]


def whole_prompt(tokens: Sequence[int], features: Sequence, side: int, request: str) -> WholePrompt:
    """Return the prompt that the shortened prompt `tokens` came from.

    features: MultiModalFeatureSpec of each image and video. side: patches along one side of a merged token. request: the
    field that images have from which tokens were selected.
    """
    whole, moved, columns, done = [], [], [], 0

    def copy(until: int) -> None:
        columns.extend(range(len(whole), len(whole) + until - done))
        whole.extend(tokens[done:until])

    for feature in sorted(features, key=lambda one: one.mm_position.offset):
        place = feature.mm_position
        copy(place.offset)
        start, done = len(whole), place.offset
        if feature.modality == "image" and request in feature.data:
            _, height, width = feature.data["image_grid_thw"].data.tolist()
            columns.extend([start] * place.length)
            whole.extend([tokens[place.offset]] * (height // side * (width // side)))
        else:
            copy(place.offset + place.length)
        done = place.offset + place.length
        position = replace(place, offset=start, length=len(whole) - start)
        moved.append(replace(feature, mm_position=position))
    copy(len(tokens))
    return WholePrompt(whole, moved, columns)
