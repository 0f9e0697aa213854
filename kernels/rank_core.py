"""A new core among the stored vision entries (A-VL, arXiv 2409.14846, section 7.2): contract, choice of the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.kernels import backend as backends
from llava.kernels.checks import check_contiguous, check_tensor
from llava.kernels.rank_core_reference import reference


def rank_core(
    scores: Tensor, image: Tensor, image_len: Tensor, core: Tensor, core_len: Tensor, *, backend: str | None = None
) -> None:
    """Fill `core` in place with the slots of the core_len[b] vision entries with the highest scores.

    The slots are in the order of `image`. Ties go to the lowest index.
    image int32 [B, N]: slots of the stored vision entries, of which the first image_len int32 [B] count
    scores float32 [B, N]: of these entries; core int32 [B, M], M at most N; core_len int32 [B], at most image_len
    Behind core_len, `core` gets the last slot of `image`, which nothing reads. All tensors are contiguous.

    backend: "triton" or "reference"; default Triton on CUDA. ValueError for shapes or dtypes that do not fit.
    """
    _check(scores, image, image_len, core, core_len)
    if not core.shape[-1]:
        return
    operands = (scores, image, image_len, core, core_len)
    if backends.backend_for(scores, backend) == "triton":
        from llava.kernels import rank_core_triton

        rank_core_triton.launch(*operands)
        return
    reference(*operands)


def _check(scores: Tensor, image: Tensor, image_len: Tensor, core: Tensor, core_len: Tensor) -> None:
    if scores.dim() != 2 or core.dim() != 2 or core.shape[1] > scores.shape[1]:
        raise ValueError(
            f"scores is {[*scores.shape]} and core {[*core.shape]}, expected are [B, N] and [B, M] with M at most N"
        )
    rows = scores.shape[:1]
    check_tensor("scores", scores, scores.shape, torch.float32)
    check_tensor("image", image, scores.shape, torch.int32)
    check_tensor("image_len", image_len, rows, torch.int32)
    check_tensor("core", core, (*rows, core.shape[1]), torch.int32)
    check_tensor("core_len", core_len, rows, torch.int32)
    check_contiguous(scores=scores, image=image, image_len=image_len, core=core, core_len=core_len)
