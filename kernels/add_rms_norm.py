"""A residual sum and the RMSNorm behind it (arXiv 1910.07467) in one kernel; picks the implementation.

Between two products of a decoder layer the hidden states take a sum and a norm: apart, they are two kernels that write
and read the states once more.
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
    """(summed, normed): summed = hidden + delta, rounded to the dtype; normed = rms_norm(summed) * weight.

    hidden [..., D] contiguous, delta of the same shape or None, weight [D], of one dtype. Sums are in float32. Without delta,
    summed is `hidden` itself and nothing is written for it. The kernel keeps a row in registers: made for D up to 8,192.

    backend: "triton" or "reference"; default Triton on CUDA. ValueError for shapes or dtypes that do not fit.
    """
    _check(hidden, delta, weight)
    if backends.backend_for(hidden, backend) == "triton":
        from llava.kernels import add_rms_norm_triton

        summed = None if delta is None else torch.empty_like(hidden)
        normed = torch.empty_like(hidden)
        add_rms_norm_triton.launch(hidden, delta, weight, eps, summed, normed)
        return hidden if summed is None else summed, normed
    return reference(hidden, delta, weight, eps)


def _check(hidden: Tensor, delta: Tensor | None, weight: Tensor) -> None:
    if not hidden.dim():
        raise ValueError("hidden has no dimension, where [..., D] is due")
    check_contiguous(hidden=hidden, weight=weight)
    check_tensor("weight", weight, hidden.shape[-1:], hidden.dtype)
    if delta is not None:
        check_tensor("delta", delta, hidden.shape, hidden.dtype)
        check_contiguous(delta=delta)
