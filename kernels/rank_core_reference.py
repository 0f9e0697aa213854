"""The core chosen anew in plain PyTorch: what the Triton kernel must equal, and what runs without CUDA."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(scores: Tensor, image: Tensor, image_len: Tensor, core: Tensor, core_len: Tensor) -> None:
    """Shapes as in rank_core; nothing in it needs the host."""
    size, most = scores.shape[1], core.shape[1]
    place = torch.arange(size, device=scores.device)
    scores = scores.masked_fill(place >= image_len[:, None], float("-inf"))
    # A stable sort: ties go to the lowest index.
    best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :most]
    best = best.masked_fill(place[:most] >= core_len[:, None], size)
    core.copy_(image.gather(1, best.sort(dim=1).values.clamp(max=size - 1)))
