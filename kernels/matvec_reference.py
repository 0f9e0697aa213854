"""The matrix-vector product in plain PyTorch: the reference for the Triton kernel, and the code that runs without CUDA."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from llava.kernels.silu_mul_reference import reference as silu_mul


def reference(states: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None) -> Tensor:
    """Return the product [1, N]; arguments as in matvec."""
    product = linear(states, weight, bias)
    return product if up is None else silu_mul(product, linear(states, up))
