"""Facility location: how well the chosen patches cover an image, and how much coverage a further patch would add.

The coverage m_u of a patch u is its similarity to the nearest chosen patch, at least 0. A patch v would add
gain(v) = sum over u of max(0, S(u, v) - m_u). Gains never rise while patches are chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 18  # similarities per block, few enough that a block stays in the CPU cache through all its steps


class Coverage:
    """Coverage and gains of all patches, tile by tile, updated while patches are chosen.

    similarity  [T, R, M] float32: S(u, v) of what is covered, u, and patch v; zeros for padding
    symmetric   whether patches cover each other: R is M, and S(u, v) = S(v, u)
    covered     [T, R]    m_u
    gain        [T, M]    coverage that each patch would add, float64

    A choice changes m_u only where the new patch is nearer than all earlier ones. On the CPU only those rows are read:
    about M * log(K) rows over K choices, where recomputing the gains would read M * K. On a GPU all rows are read,
    because the host would have to wait after every choice to learn which rows changed; unchanged rows lose nothing.
    Sums of float32 numbers in double precision are exact up to the last digits, so both ways give the recomputed gains.
    """

    def __init__(self, similarity: Tensor, symmetric: bool = True):
        self._flat = similarity.flatten(0, 1)
        # Row v: what patch v covers. The sum over u runs along it; a GPU sums a contiguous row many times faster than a
        # column.
        self.by_patch = similarity if symmetric else similarity.mT.contiguous()
        self.covered = similarity.new_zeros(similarity.shape[:-1])
        self.rows = max(1, BLOCK // max(similarity.shape[1:]))
        parts = [rows.clamp_min(0).double().sum(dim=-1) for rows in self.by_patch.split(self.rows, dim=1)]
        self.gain = torch.cat(parts, dim=1)

    @property
    def all_rows(self) -> bool:
        """Whether a choice reads all rows, so that the host never waits for the device."""
        return self.by_patch.is_cuda

    def add(self, chosen: Tensor) -> None:
        """Choose patch chosen[t] of each tile t; `chosen` [T]."""
        tiles = torch.arange(len(chosen), device=chosen.device)
        nearest = torch.maximum(self.covered, self.by_patch[tiles, chosen])
        # For before <= after: max(0, S - before) - max(0, S - after) = clamp(S, before, after) - before.
        if self.all_rows:
            between = torch.clamp(self.by_patch, self.covered[:, None], nearest[:, None])
            before = self.covered.sum(dim=1, keepdim=True, dtype=torch.float64)
            self.gain += before - between.sum(dim=2, dtype=torch.float64)
        else:
            self._lose_changed_rows(nearest, tiles)
        self.covered = nearest
        # A chosen patch adds nothing more. Rounding may have left its gain slightly off 0.
        self.gain.scatter_(1, chosen[:, None], 0.0)

    def _lose_changed_rows(self, nearest: Tensor, tiles: Tensor) -> None:
        """Lower the gains for the rows whose coverage rises to `nearest` [T, M]; tiles: 0 .. T - 1."""
        changed = torch.nonzero((nearest > self.covered).flatten()).flatten()
        for rows in changed.split(self.rows):
            before, after = (cover.flatten()[rows, None] for cover in (self.covered, nearest))
            between = torch.minimum(torch.maximum(self._flat.index_select(0, rows), before), after)
            # Rows of all tiles are in one block. The product with the 0/1 matrix sums each tile's rows on their own.
            of_tile = (rows // nearest.shape[1] == tiles[:, None]).double()
            self.gain += of_tile @ before.double() - of_tile @ between.double()
