"""silu(gate) * up in one kernel, the activation of SwiGLU (arXiv 2002.05202): contract, choice of the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.kernels import backend as backends
from llava.kernels.checks import check_last_dimension, check_tensor
from llava.kernels.silu_mul_reference import reference


def silu_mul(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """Return silu(gate) * up, contiguous, with the shape and dtype of gate.

    gate, up [..., M] of one dtype, for example halves of one product's output. The last dimension is contiguous, other
    strides are free. The arithmetic is in float32.

    backend: "triton" or "reference"; default Triton on CUDA. ValueError for shapes or dtypes that do not fit.
    """
    check_tensor("up", up, gate.shape, gate.dtype)
    if gate.dim() < 2:
        raise ValueError(f"gate is {[*gate.shape]}, expected is [..., M] with at least one dimension of rows")
    check_last_dimension(gate=gate, up=up)
    if backends.backend_for(gate, backend) == "triton":
        from llava.kernels import silu_mul_triton

        out = torch.empty(gate.shape, device=gate.device, dtype=gate.dtype)
        silu_mul_triton.launch(gate, up, out)
        return out
    return reference(gate, up)
