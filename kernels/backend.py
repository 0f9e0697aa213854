"""Which implementation of a kernel a call gets: decided here, for all kernels."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

from torch import Tensor


def backend_for(tensor: Tensor, requested: str | None = None) -> str:
    """The implementation by name, "triton" or "reference": as requested, else Triton where the tensor is on CUDA.

    ValueError for a name that is neither.
    """
    if requested not in (None, "triton", "reference"):
        raise ValueError(f'backend is "{requested}", allowed are "triton", "reference" and None')
    if requested is None:
        return "triton" if tensor.is_cuda and _has_triton() else "reference"
    return requested


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
