"""One step of eviction in Triton: one program per row and KV head (needs triton; import it lazily).

A list stays in registers from the load to the store, so a step reads and writes it once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava.kernels.selection_triton import block_for, kth_largest, ordered, value_of


@triton.jit
def _quantile(paid, live, n_live, quantile):
    """The quantile of `paid` over the live entries, linear between ranks."""
    keys = tl.where(live, ordered(paid), -0x7FFFFFFF - 1)
    rank = quantile * tl.maximum(n_live - 1, 0).to(tl.float32)
    whole = rank.to(tl.int32)
    part = rank - whole.to(tl.float32)
    key = kth_largest(keys, n_live - whole)
    higher = tl.min(tl.where(keys > key, keys, 0x7FFFFFFF), axis=0)
    repeated = n_live - tl.sum((keys > key).to(tl.int32), axis=0) > whole + 1
    below = value_of(key)
    above = tl.where(repeated | (part == 0.0), below, value_of(higher))
    # The formula of torch.lerp, which starts at the nearer end: the results equal those of the reference.
    return tl.where(part < 0.5, below + part * (above - below), above - (above - below) * (1.0 - part))


@triton.jit
def _scores(scores_ptr, paid_ptr, place, last, centre, HISTORY: tl.constexpr, CENTRED: tl.constexpr):
    """Return the scores after this step of the entries at `place`; 0 where there is no entry."""
    older = place < last
    own = place == last
    new = tl.load(paid_ptr + place, mask=older | own, other=0.0)
    if CENTRED:
        new = tl.where(older, new - centre, new)
    if HISTORY:
        new += tl.load(scores_ptr + place, mask=older, other=0.0)
    return new


# Arguments that depend on the length of a request are not specialised on: otherwise a new request may compile a kernel.
@triton.jit(
    do_not_specialize=("width", "steps"),
    do_not_specialize_on_alignment=(
        *("scores_ptr", "paid_ptr", "text_ptr", "text_len_ptr", "total_ptr", "recent_ptr", "step_ptr"),
    ),
)
def _evict(
    scores_ptr, paid_ptr, text_ptr, text_len_ptr, total_ptr, recent_ptr, step_ptr, quantile, width, steps,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, HISTORY: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """One program per row and KV head. width: entries of a list; steps: columns of the tables."""
    # 1. The budget of this step, and this program's lists.
    sequence = tl.program_id(0).to(tl.int64)
    of_step = sequence // GROUPS * steps + tl.load(step_ptr)
    total = tl.load(total_ptr + of_step)
    recent = tl.load(recent_ptr + of_step)
    last = tl.load(text_len_ptr + sequence) - 1
    scores_ptr += sequence * width
    paid_ptr += sequence * width
    text_ptr += sequence * width
    place = tl.arange(0, BLOCK)
    # 2. The scores with this step's attention.
    centre = 0.0
    if CENTRED:
        live = place <= last
        paid = tl.load(paid_ptr + place, mask=live, other=0.0)
        centre = _quantile(paid, live, last + 1, quantile)
    scores = _scores(scores_ptr, paid_ptr, place, last, centre, HISTORY, CENTRED)

    # 3. The entry that goes, and the new order, as in evict_reference.py. A program cannot permute its registers, so
    # the scores are computed again at the places that they come from.
    over = last >= total
    candidate = place <= last - recent
    lowest = tl.min(tl.where(candidate, scores, float("inf")), axis=0)
    worst = tl.max(tl.where(candidate & (scores == lowest), place, 0), axis=0)
    worst = tl.where(over, worst, last)
    order = tl.where(place == last, worst, place + ((place >= worst) & (place < last)).to(tl.int32))
    moved = _scores(scores_ptr, paid_ptr, order, last, centre, HISTORY, CENTRED)
    slots = tl.load(text_ptr + order, mask=place <= last, other=0)
    # 4. Entries move by one place, from thread to thread. The barrier separates all reads from all writes.
    tl.debug_barrier()
    tl.store(scores_ptr + place, moved, mask=place < width)
    tl.store(text_ptr + place, slots, mask=place <= last)
    tl.store(text_len_ptr + sequence, last + 1 - over.to(tl.int32))


def launch(
    scores: Tensor,
    paid: Tensor,
    text: Tensor,
    text_len: Tensor,
    total: Tensor,
    recent: Tensor,
    step: Tensor,
    rule: str,
    quantile: float,
) -> None:
    """Update scores, text and text_len in place, as evict does; shapes as there, all contiguous."""
    (batch, groups, width), steps = text.shape, total.shape[1]
    block, warps = block_for(width)
    with torch.cuda.device_of(text):
        _evict[(batch * groups,)](
            scores, paid, text, text_len, total, recent, step, float(quantile), width, steps,
            GROUPS=groups, BLOCK=block, HISTORY=rule != "latest", CENTRED=rule == "centred", num_warps=warps,
        )  # fmt: skip
