"""Cosine similarity of patches with each other, in float32. Methods measure diversity and coverage with it."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # rows per block; the blocks below the diagonal are copied, not computed


def unit_rows(vectors: Tensor) -> Tensor:
    """Return `vectors` [..., D] scaled to length one, float32. A vector that is zero or not finite becomes zero."""
    vectors = vectors.float()
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    unit = vectors / length
    return unit.masked_fill_(~(length.isfinite() & (length > 0)), 0.0)


def cosine_matrix(vectors: Tensor) -> Tensor:
    """Return the cosines of all pairs of `vectors` [..., M, D]: float32 [..., M, M].

    The matrix is exactly symmetric, and the cosine of a vector with itself is exactly 1. A vector that is zero or not
    finite has cosine 0 with every vector, itself included.
    """
    unit = unit_rows(vectors)
    count = unit.shape[-2]
    cosines = unit.new_empty(*unit.shape[:-1], count)
    for start in range(0, count, BLOCK):
        rows = unit[..., start : start + BLOCK, :]
        block = rows @ unit[..., start:, :].mT
        cosines[..., start : start + BLOCK, start:] = block
        # Copied, because a second product may round differently: two equal patches must gain equally from each other.
        cosines[..., start:, start : start + BLOCK] = block.mT
    itself = torch.diagonal(cosines, dim1=-2, dim2=-1)
    itself.copy_(itself > 0)
    return cosines
