"""Facility location: how much of an image is spoken for by the patches chosen so far, and what a further one adds.

A patch u is covered to the degree m_u of its similarity to the chosen patch that is nearest to it, at least 0. What a
patch v would add is gain(v) = sum over u of max(0, S(u, v) - m_u). Gains only fall.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 18  # numbers at once: what is read of the similarities goes through several steps while it is in the cache


class Coverage:
    """Gains of all patches, tile by tile, kept up to date while patches are chosen.

    similarity  [T, M, M] float32, symmetric; rows of zeros for padding
    covered     [T, M]    m_u
    gain        [T, M]    what each patch would add, float64

    A choice changes m_u only where the new patch is nearer than all before. On the CPU only those rows are looked at: over
    K choices M * log(K) or so of them, where recomputing the gains would take M * K. A GPU would have to be asked which
    rows they are, after every choice; there all rows are looked at, of which the others lose nothing. Of
    single-precision numbers, sums in double precision are exact to within its last digits, so the gains are those of
    recomputing either way.
    """

    def __init__(self, similarity: Tensor):
        self.similarity, self._flat = similarity, similarity.flatten(0, 1)
        self.covered = similarity.new_zeros(similarity.shape[:-1])
        self.rows = max(1, BLOCK // similarity.shape[-1])
        parts = [rows.clamp_min(0).double().sum(dim=-1) for rows in similarity.split(self.rows, dim=1)]
        self.gain = torch.cat(parts, dim=1)

    @property
    def all_rows(self) -> bool:
        """Whether a choice looks at all rows, so that the device is asked nothing."""
        return self.similarity.is_cuda

    def add(self, chosen: Tensor) -> None:
        """Choose patch chosen[t] of each tile t; `chosen` [T]."""
        tiles = torch.arange(len(chosen), device=chosen.device)
        nearest = torch.maximum(self.covered, self.similarity[tiles, chosen])
        # max(0, S - before) - max(0, S - after), for before <= after, is S kept between the two, minus before.
        if self.all_rows:
            between = torch.clamp(self.similarity, self.covered[..., None], nearest[..., None])
            before = self.covered.sum(dim=1, keepdim=True, dtype=torch.float64)
            self.gain += before - between.sum(dim=1, dtype=torch.float64)
        else:
            self._lose_changed_rows(nearest, tiles)
        self.covered = nearest
        # Exactly: what is chosen covers nothing more.
        self.gain.scatter_(1, chosen[:, None], 0.0)

    def _lose_changed_rows(self, nearest: Tensor, tiles: Tensor) -> None:
        """Take off the gains what is lost where the nearest [T, M] chosen patch is nearer than before; tiles: 0 .. T - 1."""
        changed = torch.nonzero((nearest > self.covered).flatten()).flatten()
        for rows in changed.split(self.rows):
            before, after = (cover.flatten()[rows, None] for cover in (self.covered, nearest))
            between = torch.minimum(torch.maximum(self._flat.index_select(0, rows), before), after)
            of_tile = (rows // nearest.shape[1] == tiles[:, None]).double()
            self.gain += of_tile @ before.double() - of_tile @ between.double()
