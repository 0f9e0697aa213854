"""Checks of shape, dtype and strides that the kernels' contracts share. Each raises ValueError with one sentence."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype} {[*tensor.shape]}, where {dtype} {[*shape]} is due")


def check_contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: its strides are {tensor.stride()}")


def check_last_dimension(**tensors: Tensor) -> None:
    """Strides are free but for the last dimension's."""
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"the last dimension of {name} is not contiguous: its stride is {tensor.stride(-1)}")
