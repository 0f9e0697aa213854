"""silu(gate) * up in plain PyTorch: the reference for the Triton kernel, and the code that runs without CUDA."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up; shapes as in silu_mul."""
    return silu(gate) * up
