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

    A choice changes m_u only where the new patch is nearer than all before, and only those rows are looked at: over K
    choices M * log(K) or so of them, where recomputing the gains would take M * K. Of single-precision numbers, sums in
    double precision are exact to within its last digits, so the gains are those of recomputing.
    """

    def __init__(self, similarity: Tensor):
        self.similarity, self._flat = similarity, similarity.flatten(0, 1)
        self.covered = similarity.new_zeros(similarity.shape[:-1])
        self.rows = max(1, BLOCK // similarity.shape[-1])
        parts = [rows.clamp_min(0).double().sum(dim=-1) for rows in similarity.split(self.rows, dim=1)]
        self.gain = torch.cat(parts, dim=1)

    def add(self, chosen: Tensor) -> None:
        """Choose patch chosen[t] of each tile t; `chosen` [T]."""
        tiles = torch.arange(len(chosen), device=chosen.device)
        nearest = torch.maximum(self.covered, self.similarity[tiles, chosen])
        changed = torch.nonzero((nearest > self.covered).flatten()).flatten()
        for rows in changed.split(self.rows):
            # max(0, S - before) - max(0, S - after), for before <= after, is S kept between the two, minus before.
            before, after = (cover.flatten()[rows, None] for cover in (self.covered, nearest))
            between = torch.minimum(torch.maximum(self._flat.index_select(0, rows), before), after)
            of_tile = (rows // nearest.shape[1] == tiles[:, None]).double()
            self.gain += of_tile @ before.double() - of_tile @ between.double()
        self.covered = nearest
        self.gain[tiles, chosen] = 0.0  # exactly: what is chosen covers nothing more
