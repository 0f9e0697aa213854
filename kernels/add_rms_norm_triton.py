"""Residual sum and RMSNorm in Triton: one program per row, the row in registers (needs triton; import it lazily)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Values per thread: one 16-byte load of a half-precision row. At batch 1 the latency of one program is the whole time.
_PER_THREAD = 8


@triton.jit
def _add_rms_norm(
    hidden_ptr, delta_ptr, weight_ptr, summed_ptr, normed_ptr, eps,
    WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, PADDED_WIDTH)
    inside = dims < WIDTH
    offsets = tl.program_id(0).to(tl.int64) * WIDTH + dims
    # Loaded before the sum over the row, so that the load does not wait for the sum.
    weight = tl.load(weight_ptr + dims, mask=inside, other=0.0).to(tl.float32)
    states = tl.load(hidden_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        states += tl.load(delta_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        rounded = states.to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + offsets, rounded, mask=inside)
        # The norm reads the rounded sum, as it does where sum and norm are separate modules.
        states = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(states * states, axis=0) / WIDTH + eps)
    tl.store(normed_ptr + offsets, (states * scale * weight).to(normed_ptr.dtype.element_ty), mask=inside)


def launch(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float, summed: Tensor | None, normed: Tensor
) -> None:
    """Fill `normed` and, where there is a delta, `summed`. Shapes as in add_rms_norm; all contiguous."""
    width = hidden.shape[-1]
    padded = triton.next_power_of_2(width)
    with torch.cuda.device_of(hidden):
        _add_rms_norm[(hidden.numel() // width,)](
            hidden, delta, weight, None if delta is None else summed, normed, eps,
            WIDTH=width, PADDED_WIDTH=padded, ADDS=delta is not None,
            num_warps=min(max(padded // (32 * _PER_THREAD), 1), 32),
        )  # fmt: skip
