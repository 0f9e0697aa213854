"""One step of eviction from the text region of a KV cache: the contract, and the choice of the implementation.

Rules, by how an entry's score follows from the attention `paid` that the step's query pays to it:
    summed      H2O (arXiv 2306.14048): the sum of all that it has been paid
    latest      what it is paid now
    centred     A-VL (arXiv 2409.14846): the sum of what it is paid above the `quantile` (linear between ranks) of what all
                entries are paid, the step's own included; its own step counts in full
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.kernels import backend as backends
from llava.kernels.checks import check_contiguous, check_tensor
from llava.kernels.evict_reference import reference

RULES = ("summed", "latest", "centred")


def evict(
    scores: Tensor,
    paid: Tensor,
    text: Tensor,
    text_len: Tensor,
    total: Tensor,
    recent: Tensor,
    step: Tensor,
    *,
    rule: str,
    quantile: float = 0.0,
    backend: str | None = None,
) -> None:
    """Update scores, text and text_len in place after a decode step. All tensors are contiguous.

    text int32 [B, G, T]: slots of the region, oldest entry first; the first text_len int32 [B, G] count
    scores, paid float32 [B, G, T]: in the order of text. The newest entry, at text_len - 1, belongs to this step; its
        score is set here.
    total, recent int32 [B, steps + 1]: per step, how many entries may stay, and how many of the newest, the step's own
        included, are protected
    step int32 or int64 [1]: number of this step, counted from 1
    quantile: used by rule "centred" only
    backend: "triton" or "reference"; default Triton on CUDA

    A list with more than `total` entries loses the entry with the lowest score, of equals the newest. Its slot moves
    behind the live entries, where the next entry takes it, and text_len falls by one. Scores behind the live entries
    are 0. ValueError for shapes, dtypes or a rule that do not fit.
    """
    _check(scores, paid, text, text_len, total, recent, step, rule, quantile)
    if not text.shape[-1]:
        return
    operands = (scores, paid, text, text_len, total, recent, step, rule, quantile)
    if backends.backend_for(scores, backend) == "triton":
        from llava.kernels import evict_triton

        evict_triton.launch(*operands)
        return
    reference(*operands)


def _check(scores, paid, text, text_len, total, recent, step, rule, quantile) -> None:
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}, allowed are {', '.join(map(repr, RULES))}")
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile is {quantile}, allowed is 0 to 1")
    if scores.dim() != 3 or total.dim() != 2:
        raise ValueError(
            f"scores is {[*scores.shape]} and total {[*total.shape]}, expected are [B, G, T] and [B, steps + 1]"
        )
    check_tensor("scores", scores, scores.shape, torch.float32)
    check_tensor("paid", paid, scores.shape, torch.float32)
    check_tensor("text", text, scores.shape, torch.int32)
    check_tensor("text_len", text_len, scores.shape[:2], torch.int32)
    check_tensor("total", total, (scores.shape[0], total.shape[1]), torch.int32)
    check_tensor("recent", recent, total.shape, torch.int32)
    check_tensor("step", step, (1,), torch.int32 if step.dtype == torch.int32 else torch.int64)
    check_contiguous(scores=scores, paid=paid, text=text, text_len=text_len, total=total, recent=recent)
