"""Residual sum and RMSNorm in plain PyTorch: the reference for the Triton kernel, and the code without CUDA."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (summed, normed); shapes as in add_rms_norm."""
    summed = hidden if delta is None else hidden + delta
    return summed, torch.rms_norm(summed, weight.shape, weight, eps)
