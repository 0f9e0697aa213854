"""The choice between Triton and PyTorch, made in this one place for all kernels."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

from torch import Tensor


def backend_for(tensor: Tensor, requested: str | None = None) -> str:
    """Return the implementation, "triton" or "reference": the requested one, else Triton for tensors on CUDA.

    ValueError for any other name.
    """
    if requested not in (None, "triton", "reference"):
        raise ValueError(f'backend is "{requested}", allowed are "triton", "reference" and None')
    if requested is None:
        return "triton" if tensor.is_cuda and _has_triton() else "reference"
    return requested


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    # find_spec looks for triton without importing it. Not every build of torch with CUDA has it (Windows).
    return importlib.util.find_spec("triton") is not None
