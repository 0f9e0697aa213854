"""A new core in plain PyTorch: the reference for the Triton kernel, and the code that runs without CUDA."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(scores: Tensor, image: Tensor, image_len: Tensor, core: Tensor, core_len: Tensor) -> None:
    """Fill `core` in place; shapes as in rank_core. Nothing waits for the device."""
    size, most = scores.shape[1], core.shape[1]
    place = torch.arange(size, device=scores.device)
    scores = scores.masked_fill(place >= image_len[:, None], float("-inf"))
    # A stable sort: ties go to the lowest index.
    best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :most]
    # `size` is larger than every index, so the sort puts it behind the chosen ones; clamp makes it a valid index.
    best = best.masked_fill(place[:most] >= core_len[:, None], size)
    core.copy_(image.gather(1, best.sort(dim=1).values.clamp(max=size - 1)))
