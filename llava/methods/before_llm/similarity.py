"""Cosine similarity of patches with each other, in single precision: what diversity and coverage are measured by."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # rows at once: half of a large symmetric matrix is never computed


def unit_rows(vectors: Tensor) -> Tensor:
    """[..., D] vectors scaled to length one, float32. A vector that is zero or not finite becomes zero."""
    vectors = vectors.float()
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    unit = vectors / length
    return unit.masked_fill_(~(length.isfinite() & (length > 0)), 0.0)


def cosine_matrix(vectors: Tensor) -> Tensor:
    """[..., M, D] -> [..., M, M] cosines of all pairs, float32, exactly symmetric and exactly 1 with itself: what two
    patches add to each other is then equal where it should be.

    A vector that is zero or not finite has cosine 0 with every other and with itself.
    """
    unit = unit_rows(vectors)
    count = unit.shape[-2]
    cosines = unit.new_empty(*unit.shape[:-1], count)
    for start in range(0, count, BLOCK):
        rows = unit[..., start : start + BLOCK, :]
        block = rows @ unit[..., start:, :].mT
        cosines[..., start : start + BLOCK, start:] = block
        cosines[..., start:, start : start + BLOCK] = block.mT
    itself = torch.diagonal(cosines, dim1=-2, dim2=-1)
    itself.copy_(itself > 0)
    return cosines
