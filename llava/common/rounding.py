"""Whole numbers from shares."""

from __future__ import annotations


def floor_share(part: float, n: float) -> int:
    """Return `part` of n, rounded down.

    A product just below a whole number counts as that number: 0.29 * 100 is 28.999999999999996 in floating point.
    """
    return int(part * n + 1e-6)
