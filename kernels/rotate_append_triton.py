"""Rotary embedding and new cache entries in Triton: one program per token and KV head (needs triton; import it lazily).

A program reads the two halves of each head as separate registers. A rotation combines both halves, so no thread needs
values of another thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotated(low, high, cos_low, cos_high, sin_low, sin_high):
    """Return both halves of x * cos + roll(x, d / 2) * sin."""
    return low * cos_low + high * sin_low, high * cos_high + low * sin_high


# Arguments that depend on the length of a request are not specialised on: otherwise a new request may compile a kernel.
@triton.jit(
    do_not_specialize=("tokens", "slots_row", "slots_group"),
    do_not_specialize_on_alignment=("slots_ptr", "counts_ptr"),
)
def _rotate_append(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, slots_ptr, counts_ptr, out_ptr,
    tokens,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, cos_row, cos_token, sin_row, sin_token,
    keys_row, keys_group, keys_slot, values_row, values_group, values_slot, slots_row, slots_group,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, PADDED_GROUP: tl.constexpr, PADDED_HALF: tl.constexpr,
    COUNTED: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """One program per token and KV head. Strides count elements."""
    # 1. The slot of the new entry. 64 bits: a large cache has more than 2^31 elements.
    row = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    place = token
    if LISTED:
        place += tl.load(counts_ptr + row * GROUPS + group) - tokens
        slot = tl.load(slots_ptr + row * slots_row + group * slots_group + place).to(tl.int64)
    elif COUNTED:
        slot = place + tl.load(counts_ptr + row) - tokens
    else:
        slot = place

    # 2. cos and sin of this token.
    dims = tl.arange(0, PADDED_HALF)
    inside = dims < HALF
    cos_ptr += row * cos_row + token * cos_token + dims
    sin_ptr += row * sin_row + token * sin_token + dims
    cos_low = tl.load(cos_ptr, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_ptr + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_ptr, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_ptr + HALF, mask=inside, other=0.0).to(tl.float32)

    # 3. The key, rotated, and the value, into the cache.
    k_ptr += row * k_row + token * k_token + group * k_head + dims
    v_ptr += row * v_row + token * v_token + group * v_head + dims
    low = tl.load(k_ptr, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(k_ptr + HALF, mask=inside, other=0.0).to(tl.float32)
    value_low = tl.load(v_ptr, mask=inside, other=0.0)
    value_high = tl.load(v_ptr + HALF, mask=inside, other=0.0)
    low, high = _rotated(low, high, cos_low, cos_high, sin_low, sin_high)
    keys_ptr += row * keys_row + group * keys_group + slot * keys_slot + dims
    values_ptr += row * values_row + group * values_group + slot * values_slot + dims
    tl.store(keys_ptr, low.to(keys_ptr.dtype.element_ty), mask=inside)
    tl.store(keys_ptr + HALF, high.to(keys_ptr.dtype.element_ty), mask=inside)
    tl.store(values_ptr, value_low, mask=inside)
    tl.store(values_ptr + HALF, value_high, mask=inside)

    # 4. The queries of the group, rotated.
    member = tl.arange(0, PADDED_GROUP)
    head = group * GROUP + member
    mask = (member < GROUP)[:, None] & inside[None, :]
    q_ptr += row * q_row + token * q_token + head[:, None] * q_head + dims[None, :]
    low = tl.load(q_ptr, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(q_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    low, high = _rotated(low, high, cos_low[None, :], cos_high[None, :], sin_low[None, :], sin_high[None, :])
    out_ptr += ((row * GROUPS * GROUP + head[:, None]) * tokens + token) * (2 * HALF) + dims[None, :]
    tl.store(out_ptr, low.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + HALF, high.to(out_ptr.dtype.element_ty), mask=mask)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor | None,
    counts: Tensor | None,
    out: Tensor,
) -> None:
    """Fill `out`, contiguous, and the new entries of keys and values. Shapes as in rotate_append."""
    (batch, tokens, heads, size), groups = q.shape, k.shape[2]
    # An expanded row has stride 0, so one rotation serves all rows without a copy.
    cos, sin = (part.expand(batch, -1, -1) for part in (cos, sin))
    half, group = triton.next_power_of_2(size // 2), triton.next_power_of_2(heads // groups)
    listed = slots is not None
    with torch.cuda.device_of(q):
        _rotate_append[(batch * tokens, groups)](
            q, k, v, cos, sin, keys, values, slots, counts, out, tokens,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *cos.stride()[:2], *sin.stride()[:2],
            *keys.stride()[:3], *values.stride()[:3], *(slots.stride()[:2] if listed else (0, 0)),
            GROUPS=groups, GROUP=heads // groups, HALF=size // 2, PADDED_GROUP=group, PADDED_HALF=half,
            COUNTED=counts is not None, LISTED=listed, num_warps=min(max(group * half // 256, 1), 4),
        )  # fmt: skip
