"""Exact selection among float32 values that one program holds in registers, for Triton kernels (needs triton)."""

from __future__ import annotations

import triton
import triton.language as tl

# Of a list: values in registers and warps. Few sizes, so that few kernels are compiled for lists of all lengths.
_BLOCKS = ((1024, 4), (4096, 8), (8192, 16))


def block_for(width: int) -> tuple[int, int]:
    """(block, warps) for a list of `width` entries; beyond the largest, the next power of two, where registers may spill."""
    for block, warps in _BLOCKS:
        if width <= block:
            return block, warps
    return triton.next_power_of_2(width), 32


@triton.jit
def ordered(values):
    """Keys, int32, in the order of the float32 values; 0 and -0 have one key."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The float32 value of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def kth_largest(keys, k):
    """The k-th largest of the keys, k counted from 1, bit by bit: the largest number that k keys reach.

    The lowest number of all stands for what is no key. k = 0: the highest number of all.
    """
    found = tl.where(tl.sum((keys >= 0).to(tl.int32), axis=0) >= k, 0, -0x7FFFFFFF - 1)
    for bit in range(31):
        higher = found | (1 << (30 - bit))
        found = tl.where(tl.sum((keys >= higher).to(tl.int32), axis=0) >= k, higher, found)
    return found
