"""Residual sum and RMSNorm in plain PyTorch: what the Triton kernel must equal, and what runs without CUDA."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(summed, normed); shapes as in add_rms_norm."""
    summed = hidden if delta is None else hidden + delta
    return summed, torch.rms_norm(summed, weight.shape, weight, eps)
