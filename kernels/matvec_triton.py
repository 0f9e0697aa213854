"""The matrix-vector product in Triton: one program per few rows of the weight (needs triton; import it lazily)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The fastest of 29 settings on an H100 over the four products of a 7B model's layer. A program reads two rows of weights:
# with `up` one of each. The loop is unrolled, so that four loads of 16 bytes per thread and row are in flight.
_ROWS = 2
_BLOCK = 1024
_UNROLL = 4


@triton.jit
def _matvec(
    states_ptr, weight_ptr, bias_ptr, up_ptr, out_ptr, rows, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, BIASED: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    columns = tl.arange(0, BLOCK)
    # 64 bits: a large weight has more than 2^31 elements.
    offsets = row.to(tl.int64)[:, None] * width + columns[None, :]
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    other = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(0, width, BLOCK, loop_unroll_factor=UNROLL):
        known = start + columns < width
        mask = inside[:, None] & known[None, :]
        # A step reads a weight once, so it need not stay in the L2 cache. The states stay there.
        weight = tl.load(weight_ptr + offsets + start, mask=mask, other=0.0, eviction_policy="evict_first")
        states = tl.load(states_ptr + start + columns, mask=known, other=0.0).to(tl.float32)[None, :]
        acc += weight.to(tl.float32) * states
        if GATED:
            up = tl.load(up_ptr + offsets + start, mask=mask, other=0.0, eviction_policy="evict_first")
            other += up.to(tl.float32) * states
    product = tl.sum(acc, axis=1)
    if GATED:
        product = product * tl.sigmoid(product) * tl.sum(other, axis=1)
    if BIASED:
        product += tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, product.to(out_ptr.dtype.element_ty), mask=inside)


def launch(states: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None, out: Tensor) -> None:
    """Fill `out` [1, N], contiguous. Shapes as in matvec."""
    rows, width = weight.shape
    each = _ROWS if up is None else _ROWS // 2
    with torch.cuda.device_of(states):
        _matvec[(triton.cdiv(rows, each),)](
            states, weight, bias, up, out, rows, width,
            ROWS=each, BLOCK=min(_BLOCK, triton.next_power_of_2(width)), UNROLL=_UNROLL,
            BIASED=bias is not None, GATED=up is not None, num_warps=4,
        )  # fmt: skip
