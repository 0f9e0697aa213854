"""Rotary embedding (RoPE, arXiv 2104.09864) and new KV cache entries in one kernel.

This file is the contract and chooses the implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.kernels import backend as backends
from llava.kernels.checks import check_contiguous, check_last_dimension, check_tensor
from llava.kernels.rotate_append_reference import reference


def rotate_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor | None = None,
    counts: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Return the rotated queries [B, H, S, d], contiguous; write the rotated k and v into keys and values in place.

    q [B, S, H, d]; k, v [B, S, G, d], H a multiple of G, for example views of one product's output
    cos, sin [B, S, d], or [1, S, d] for all rows; sin has the sign of rotate_half, so that
        rotated = x * cos + roll(x, d / 2) * sin
    keys, values [B, G, C, d]
    All are of one dtype. The last dimension is contiguous, other strides are free. The arithmetic is in float32.

    Token s of row b goes, for KV head g, to:
        counts None                                   slot s (prefill)
        counts int32 [B]                              slot counts[b] - S + s
        counts int32 [B, G], slots int32 [B, G, T]    slot slots[b, g, counts[b, g] - S + s]
    counts include the new tokens. Counts and slots are not checked against the storage, because the host would have to
    wait for the device.

    backend: "triton" or "reference"; default Triton on CUDA. ValueError for shapes or dtypes that do not fit.
    """
    _check(q, k, v, cos, sin, keys, values)
    _check_places(k, keys, slots, counts)
    operands = (q, k, v, cos, sin, keys, values, slots, counts)
    if backends.backend_for(q, backend) == "triton":
        from llava.kernels import rotate_append_triton

        batch, tokens, heads, size = q.shape
        out = torch.empty(batch, heads, tokens, size, device=q.device, dtype=q.dtype)
        rotate_append_triton.launch(*operands, out)
        return out
    return reference(*operands)


def _check(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or keys.dim() != 4:
        raise ValueError(
            f"q is {[*q.shape]}, k {[*k.shape]} and keys {[*keys.shape]}, "
            "expected are [B, S, H, d], [B, S, G, d] and [B, G, C, d]"
        )
    (batch, tokens, heads, size), groups, slots = q.shape, k.shape[2], keys.shape[2]
    if not groups or heads % groups or size % 2:
        raise ValueError(f"q {[*q.shape]} does not fit k {[*k.shape]}: G divides H, and d is even")
    check_tensor("k", k, (batch, tokens, groups, size), q.dtype)
    check_tensor("v", v, k.shape, q.dtype)
    check_tensor("cos", cos, (1 if cos.shape[0] == 1 else batch, tokens, size), q.dtype)
    check_tensor("sin", sin, cos.shape, q.dtype)
    check_tensor("keys", keys, (batch, groups, slots, size), q.dtype)
    check_tensor("values", values, keys.shape, q.dtype)
    check_last_dimension(q=q, k=k, v=v, cos=cos, sin=sin, keys=keys, values=values)


def _check_places(k: Tensor, keys: Tensor, slots: Tensor | None, counts: Tensor | None) -> None:
    batch, tokens, groups, _ = k.shape
    if tokens > keys.shape[2]:
        raise ValueError(f"{tokens} tokens do not fit into {keys.shape[2]} slots")
    if slots is not None:
        if counts is None:
            raise ValueError("slots are given without counts, expected are both")
        check_tensor("slots", slots, (batch, groups, slots.shape[-1]), torch.int32)
        check_last_dimension(slots=slots)
    if counts is not None:
        check_tensor("counts", counts, (batch,) if slots is None else (batch, groups), torch.int32)
        check_contiguous(counts=counts)
