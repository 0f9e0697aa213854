"""silu(gate) * up in plain PyTorch: what the Triton kernel must equal, and what runs without CUDA."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """Shapes as in silu_mul."""
    return silu(gate) * up
