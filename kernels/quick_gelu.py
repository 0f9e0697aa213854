"""QuickGELU in one kernel, the activation of CLIP's MLPs (arXiv 2103.00020): contract, choice of the kernel.

As PyTorch operations it is three kernels. Each of them writes and reads the widest states of the vision tower.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.kernels import backend as backends
from llava.kernels.checks import check_contiguous
from llava.kernels.quick_gelu_reference import reference


def quick_gelu(hidden: Tensor, *, backend: str | None = None) -> Tensor:
    """Return hidden * sigmoid(1.702 * hidden), contiguous, with the shape and dtype of hidden.

    hidden: any shape, contiguous. The arithmetic of the kernel is in float32. The kernel has no gradient, the reference
    has one.

    backend: "triton" or "reference"; default Triton on CUDA, but the reference where autograd needs the gradient.
    ValueError for a tensor that is not contiguous.
    """
    check_contiguous(hidden=hidden)
    if backend is None and torch.is_grad_enabled() and hidden.requires_grad:
        backend = "reference"
    if backends.backend_for(hidden, backend) == "triton":
        from llava.kernels import quick_gelu_triton

        out = torch.empty_like(hidden)
        quick_gelu_triton.launch(hidden, out)
        return out
    return reference(hidden)
