"""Density-peak clustering of token states, without randomness."""

from __future__ import annotations

import torch
from torch import Tensor


def density_peaks(states: Tensor, clusters: int) -> Tensor:
    """Return the cluster number [n], 0 .. clusters - 1, of each of `states` [n, D]; 1 <= clusters <= n.

    This is the clustering of SparseVLM (arXiv 2410.04417). Distances are Euclidean, divided by sqrt(D), in float32.
    The density of a state is exp(-mean squared distance to its `clusters` nearest states), itself included. The
    separation of a state is the distance to the nearest state of higher density; for the densest state it is the
    largest distance of all. The centres are the states with the largest density x separation, numbered from the largest
    down. Every other state joins its nearest centre.

    Ties: of equally dense states the later one counts as denser. Such ties are common: with two clusters, two states
    that are each other's nearest neighbours have exactly the same density. Published code adds a random 1e-6 instead.
    Of equally good centres the earlier one wins, and of equally near centres the one with the lower number.
    """
    states = states.float()
    # Not by matrix product: |a|^2 + |b|^2 - 2ab cancels in float32, and equal states would get a distance above 0.
    distance = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist") / states.shape[1] ** 0.5
    nearest = distance.topk(clusters, dim=1, largest=False).values
    density = (-nearest.square().mean(dim=1)).exp()
    index = torch.arange(len(states), device=states.device)
    denser = (density > density[:, None]) | ((density == density[:, None]) & (index > index[:, None]))
    separation = distance.masked_fill(~denser, float("inf")).amin(dim=1)
    separation = torch.where(separation.isinf(), distance.max(), separation)
    centres = torch.sort(density * separation, descending=True, stable=True).indices[:clusters]
    cluster = distance[:, centres].argmin(dim=1)
    # Each centre has its own number: of equal centres, argmin would give all the lowest, and leave clusters empty.
    cluster[centres] = torch.arange(clusters, device=states.device)
    return cluster
