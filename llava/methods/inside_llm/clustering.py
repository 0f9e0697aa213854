"""Density-peak clustering of token states, without randomness."""

from __future__ import annotations

import torch
from torch import Tensor


def density_peaks(states: Tensor, clusters: int) -> Tensor:
    """Cluster number [n], 0 .. clusters - 1, of each of `states` [n, D]; 1 <= clusters <= n.

    Distances are Euclidean over the root of D, in float32. A state's density is exp of minus the mean squared distance
    to its `clusters` nearest states, itself among them. Its separation is the distance to the nearest state of higher
    density, and for the densest state the largest distance of all. The states with the largest product of the two are
    the centres, numbered from the largest on, and every other state goes to its nearest centre. Ties: of equally dense
    states the later counts as denser (nearest neighbours of each other are exactly as dense where there are two
    clusters; published code adds a random 1e-6); of equally good centres the earlier, and the lower number, wins.
    """
    states = states.float()
    distance = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist") / states.shape[1] ** 0.5
    nearest = distance.topk(clusters, dim=1, largest=False).values
    density = (-nearest.square().mean(dim=1)).exp()
    index = torch.arange(len(states), device=states.device)
    denser = (density > density[:, None]) | ((density == density[:, None]) & (index > index[:, None]))
    separation = distance.masked_fill(~denser, float("inf")).amin(dim=1)
    separation = torch.where(separation.isinf(), distance.max(), separation)
    centres = torch.sort(density * separation, descending=True, stable=True).indices[:clusters]
    cluster = distance[:, centres].argmin(dim=1)
    cluster[centres] = torch.arange(clusters, device=states.device)
    return cluster
