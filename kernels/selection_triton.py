"""Exact selection among float32 values in the registers of one program, for Triton kernels (needs triton).

Triton has no stable top-k of a runtime length. Here the k-th largest value is found bit by bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

# (values in registers, warps) of a list. Few sizes mean few compiled kernels for lists of all lengths.
_BLOCKS = ((1024, 4), (4096, 8), (8192, 16))


def block_for(width: int) -> tuple[int, int]:
    """Return (block, warps) for a list of `width` entries.

    Longer lists than the table has get the next power of two; registers may spill there, which is slower.
    """
    for block, warps in _BLOCKS:
        if width <= block:
            return block, warps
    return triton.next_power_of_2(width), 32


@triton.jit
def ordered(values):
    """Return int32 keys that compare like the float32 values; 0 and -0 have the same key."""
    # The bits of floats of one sign compare like integers. For negative values the order is reversed, so all bits but
    # the sign are flipped.
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """Return the float32 value of a key; the flip of `ordered` is its own inverse."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def kth_largest(keys, k):
    """Return the k-th largest of the int32 keys, k counted from 1; the largest int32 for k = 0.

    This is the largest number that at least k keys reach. It is found bit by bit, from the sign down. Places without a
    key hold the smallest int32.
    """
    found = tl.where(tl.sum((keys >= 0).to(tl.int32), axis=0) >= k, 0, -0x7FFFFFFF - 1)
    for bit in range(31):
        higher = found | (1 << (30 - bit))
        found = tl.where(tl.sum((keys >= higher).to(tl.int32), axis=0) >= k, higher, found)
    return found
