"""Residual sum and RMSNorm (arXiv 1910.07467) in one kernel: the contract, and the choice of the implementation.

Between two matrix products of a decoder layer, the hidden states pass a residual sum and a norm. As two kernels these
would write and read the states once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.kernels import backend as backends
from llava.kernels.add_rms_norm_reference import reference
from llava.kernels.checks import check_contiguous, check_tensor


def add_rms_norm(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return (summed, normed): summed = hidden + delta, rounded to the dtype; normed = rms_norm(summed) * weight.

    hidden [..., D] contiguous; delta: the same shape, contiguous, or None; weight [D]; all of one dtype. Sums are in
    float32. Without delta, summed is `hidden` itself, and no copy is written. The kernel keeps a row in registers; it
    is made for D up to 8,192.

    backend: "triton" or "reference"; default Triton on CUDA. ValueError for shapes or dtypes that do not fit.
    """
    _check(hidden, delta, weight)
    if backends.backend_for(hidden, backend) == "triton":
        # Imported here: the file needs triton, which a machine without a GPU may not have.
        from llava.kernels import add_rms_norm_triton

        summed = None if delta is None else torch.empty_like(hidden)
        normed = torch.empty_like(hidden)
        add_rms_norm_triton.launch(hidden, delta, weight, eps, summed, normed)
        return hidden if summed is None else summed, normed
    return reference(hidden, delta, weight, eps)


def _check(hidden: Tensor, delta: Tensor | None, weight: Tensor) -> None:
    if not hidden.dim():
        raise ValueError("hidden has no dimension, expected is [..., D]")
    check_contiguous(hidden=hidden, weight=weight)
    check_tensor("weight", weight, hidden.shape[-1:], hidden.dtype)
    if delta is not None:
        check_tensor("delta", delta, hidden.shape, hidden.dtype)
        check_contiguous(delta=delta)
