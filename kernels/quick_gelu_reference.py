"""QuickGELU in plain PyTorch: the reference for the Triton kernel, and the code without CUDA and with gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(hidden: Tensor) -> Tensor:
    """Return hidden * sigmoid(1.702 * hidden), shape as in quick_gelu; bit for bit transformers' QuickGELUActivation."""
    return hidden * torch.sigmoid(1.702 * hidden)
