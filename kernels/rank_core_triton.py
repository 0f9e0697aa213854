"""A new core in Triton: one program per row, its scores in registers (needs triton; import it lazily)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava.kernels.selection_triton import block_for, kth_largest, ordered


# Arguments that depend on the length of a request are not specialised on: otherwise a new request may compile a kernel.
@triton.jit(
    do_not_specialize=("width", "most"),
    do_not_specialize_on_alignment=("scores_ptr", "image_ptr", "image_len_ptr", "core_ptr", "core_len_ptr"),
)
def _rank_core(
    scores_ptr, image_ptr, image_len_ptr, core_ptr, core_len_ptr, width, most, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per row. width: entries of the list of vision entries; most: of the core list."""
    row = tl.program_id(0).to(tl.int64)
    n_image = tl.load(image_len_ptr + row)
    n_core = tl.load(core_len_ptr + row)
    place = tl.arange(0, BLOCK)
    image_ptr += row * width
    core_ptr += row * most
    scores = tl.load(scores_ptr + row * width + place, mask=place < n_image, other=float("-inf"))
    slots = tl.load(image_ptr + place, mask=place < width, other=0)
    keys = tl.where(place < width, ordered(scores), -0x7FFFFFFF - 1)
    # All entries above the n_core-th largest key are chosen. The room that is left goes to the first of those that
    # equal it, which is the tie rule of a stable sort.
    edge = kth_largest(keys, n_core)
    above = keys > edge
    tied = (keys == edge).to(tl.int32)
    room = n_core - tl.sum(above.to(tl.int32), axis=0)
    chosen = above | ((tied > 0) & (tl.cumsum(tied, axis=0) <= room))
    position = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(core_ptr + position, slots, mask=chosen)
    tl.store(core_ptr + place, tl.load(image_ptr + width - 1), mask=(place >= n_core) & (place < most))


def launch(scores: Tensor, image: Tensor, image_len: Tensor, core: Tensor, core_len: Tensor) -> None:
    """Fill `core` in place, as rank_core does; shapes as there, all contiguous."""
    (batch, width), most = scores.shape, core.shape[1]
    block, warps = block_for(width)
    with torch.cuda.device_of(scores):
        _rank_core[(batch,)](scores, image, image_len, core, core_len, width, most, BLOCK=block, num_warps=warps)
