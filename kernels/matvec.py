"""Product of a weight with one row of states, and the gated product of SwiGLU (arXiv 2002.05202), in one kernel.

At batch 1 a decode step reads every weight of the LLM once and multiplies it with one row. On an H100, cuBLAS reads these
weights at 2.1 to 2.8 TB/s and this kernel at 2.6 to 3.0 (docs/performance.md). This file is the contract and chooses the
implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.kernels import backend as backends
from llava.kernels.checks import check_contiguous, check_tensor
from llava.kernels.matvec_reference import reference


def matvec(
    states: Tensor, weight: Tensor, bias: Tensor | None = None, *, up: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Return states @ weight.T + bias, or, with `up`, silu(states @ weight.T) * (states @ up.T); [1, N].

    states [1, K]; weight [N, K]; bias [N] or None; up [N, K] or None. With `up` there is no bias. All are contiguous and of
    one dtype. Sums are in float32; the gated product is rounded once.

    backend: "triton" or "reference"; default Triton on CUDA. ValueError for shapes or dtypes that do not fit.
    """
    _check(states, weight, bias, up)
    if backends.backend_for(states, backend) == "triton":
        from llava.kernels import matvec_triton

        out = torch.empty(1, len(weight), device=states.device, dtype=states.dtype)
        matvec_triton.launch(states, weight, bias, up, out)
        return out
    return reference(states, weight, bias, up)


def _check(states: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight is {[*weight.shape]}, expected is [N, K]")
    check_tensor("states", states, (1, weight.shape[1]), weight.dtype)
    check_contiguous(states=states, weight=weight)
    if up is not None:
        if bias is not None:
            raise ValueError("a gated product has no bias, so bias must be None where up is given")
        check_tensor("up", up, weight.shape, weight.dtype)
        check_contiguous(up=up)
    if bias is not None:
        check_tensor("bias", bias, weight.shape[:1], weight.dtype)
        check_contiguous(bias=bias)
