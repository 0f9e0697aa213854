"""Copies between host and device. All such copies go through this file, so that those which wait can be counted.

A copy from pinned memory to the device does not wait. A copy to the host waits until the device has finished all its
queued work, and no new kernel is launched meanwhile. A batch should therefore have few copies to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A copy from the host to a GPU does not wait for the GPU."""
    # non_blocking has an effect only from pinned memory. PyTorch keeps the pinned block until the copy has run.
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(tensor: Tensor) -> Tensor:
    """`tensor` on the host. A copy from a GPU waits for the GPU."""
    return tensor.cpu()


def to_host_together(*tensors: Tensor | None) -> list[Tensor | None]:
    """Integer or bool tensors on the host, in the order given. None stays None; at least one must be a tensor.

    Tensors of one device are copied together, which waits once, and come back as int64. Tensors of several devices
    are copied one by one and keep their dtype.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if len({tensor.device for tensor in given}) > 1:
        return [None if tensor is None else to_host(tensor) for tensor in tensors]
    packed = to_host(torch.cat([tensor.flatten().long() for tensor in given]))
    parts = iter(packed.split([tensor.numel() for tensor in given]))
    return [None if tensor is None else next(parts).view(tensor.shape) for tensor in tensors]
