"""Numbers between host and device: the two ways there are, so that what waits for a GPU can be counted.

A copy to the device from pinned memory waits for nothing. A copy to the host waits for all that the device has been given
to do, and nothing is launched meanwhile: a batch affords few of them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from the host to a GPU without waiting for it."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(tensor: Tensor) -> Tensor:
    """`tensor` on the host, which waits for the device where it is on one."""
    return tensor.cpu()


def to_host_together(*tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors of whole numbers (or None, but not all) on the host: those of one device in one copy, as int64."""
    given = [tensor for tensor in tensors if tensor is not None]
    if len({tensor.device for tensor in given}) > 1:
        return [None if tensor is None else to_host(tensor) for tensor in tensors]
    packed = to_host(torch.cat([tensor.flatten().long() for tensor in given]))
    parts = iter(packed.split([tensor.numel() for tensor in given]))
    return [None if tensor is None else next(parts).view(tensor.shape) for tensor in tensors]
