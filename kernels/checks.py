"""Checks of shape, dtype and strides, shared by the kernels' contracts. Each raises ValueError with one sentence.

Only properties that the host knows are checked. A check of values would wait for the device and break a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError unless `tensor` has this shape and dtype."""
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype} {[*tensor.shape]}, expected is {dtype} {[*shape]}")


def check_contiguous(**tensors: Tensor) -> None:
    """Raise ValueError unless every tensor is contiguous."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: its strides are {tensor.stride()}")


def check_last_dimension(**tensors: Tensor) -> None:
    """Raise ValueError unless the last dimension of every tensor is contiguous; other strides are free."""
    # PyTorch gives a dimension of size 1 any stride, and the kernels never multiply by it.
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"the last dimension of {name} is not contiguous: its stride is {tensor.stride(-1)}")
