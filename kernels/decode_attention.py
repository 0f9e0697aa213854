"""Attention of one query per row over listed slots of a KV cache: the contract, and the choice of the implementation.

A query reads the union of three disjoint parts. The length of each part is on the device:

    prefix   slots 0 .. prefix_len - 1, the same for all heads
    core     a list of slots per row, shared by all heads of the layer (A-VL's core, arXiv 2409.14846; by its section
             7.2 all heads read the same vision tokens)
    text     a list of slots per row and KV head (text entries that were not evicted)

Slots in no part cost nothing: they are not read, copied or masked. On CUDA this is two launches of Triton kernels
(decode_attention_triton.py). Their grids depend on shapes alone, so a decode step can be captured as a CUDA graph.
Without CUDA the plain PyTorch of decode_attention_reference.py runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llava.kernels import backend as backends
from llava.kernels.checks import check_contiguous, check_last_dimension, check_tensor
from llava.kernels.decode_attention_reference import reference

SCORES = (False, True, "core", "text")


class DecodeOutput(NamedTuple):
    """Result of decode_attention. Passed as `out`, it is filled in place.

    out [B, H, D]: attention output in the dtype of the queries
    core_scores float32 [B, Nc]: probability of each entry of the core list, mean over all heads; 0 behind core_len
    text_scores float32 [B, G, Nt]: probability of each entry of the text list, summed over the query heads of the KV
        head; 0 behind text_len
    Scores that were not requested are None.
    """

    out: Tensor
    core_scores: Tensor | None = None
    text_scores: Tensor | None = None

    @classmethod
    def empty(cls, q: Tensor, core: Tensor, text: Tensor, scores: bool | str = False) -> DecodeOutput:
        """Return uninitialised tensors for a result. A step that gets them as `out` allocates nothing."""
        floats = {"device": q.device, "dtype": torch.float32}
        return cls(
            torch.empty(q.shape, device=q.device, dtype=q.dtype),
            torch.empty(core.shape, **floats) if scores in (True, "core") else None,
            torch.empty(text.shape, **floats) if scores in (True, "text") else None,
        )


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_len: Tensor,
    core: Tensor,
    core_len: Tensor,
    text: Tensor,
    text_len: Tensor,
    *,
    scale: float | None = None,
    scores: bool | str = False,
    out: DecodeOutput | None = None,
    workspace=None,
    backend: str | None = None,
) -> DecodeOutput:
    """Return softmax(scale * q k^T) v over the slots of the three parts; a row that reads no slot gives zeros.

    q [B, H, D]; k, v [B, G, C, D], H a multiple of G. The last dimension is contiguous, other strides are free. The
    softmax is computed in float32.
    prefix_len int32 [B]; core int32 [B, Nc], of which the first core_len[b] count; text int32 [B, G, Nt], of which the
    first text_len[b, g] count. Nc and Nt may be 0. Lengths and slots are not checked against the storage, because the
    host would have to wait for the device.

    scale: default 1 / sqrt(D)
    scores: True for both scores, "core" or "text" for one of them (see DecodeOutput)
    out, workspace: preallocated, from DecodeOutput.empty and decode_workspace; without them the call allocates
    backend: "triton" or "reference"; default Triton on CUDA and the reference elsewhere

    The result is deterministic: sums over splits and heads have a fixed order. ValueError for shapes or dtypes that do
    not fit.
    """
    _check(q, k, v, prefix_len, core, core_len, text, text_len, scores)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    operands = (q, k, v, prefix_len, core, core_len, text, text_len)
    if backends.backend_for(q, backend) == "triton":
        from llava.kernels import decode_attention_triton

        out = DecodeOutput.empty(q, core, text, scores) if out is None else out
        workspace = decode_attention_triton.Workspace.empty(q, k, core, text) if workspace is None else workspace
        decode_attention_triton.launch(*operands, scale, scores, out, workspace)
        return out
    result = DecodeOutput(*reference(*operands, scale, scores))
    if out is None:
        return result
    for mine, theirs in zip(result, out, strict=True):
        if mine is not None:
            theirs.copy_(mine)
    return out


def decode_workspace(
    q: Tensor, k: Tensor, core: Tensor, text: Tensor, splits: int | None = None, backend: str | None = None
):
    """Return scratch memory for decode_attention on tensors of these shapes, or with shorter lists.

    The result is None for the reference, which needs none. Layers run one after another, so one workspace serves all.
    splits: number of programs that share the slots of a row; by default it follows from the shapes and the number of
    multiprocessors.
    """
    if backends.backend_for(q, backend) != "triton":
        return None
    from llava.kernels.decode_attention_triton import Workspace

    return Workspace.empty(q, k, core, text, splits)


def _check(q, k, v, prefix_len, core, core_len, text, text_len, scores) -> None:
    """Raise ValueError for operands that do not fit. Wrong strides or dtypes would make the kernel read garbage."""
    if scores not in SCORES:
        raise ValueError(f"scores is {scores!r}, allowed are {', '.join(map(repr, SCORES))}")
    if q.dim() != 3 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"q is {[*q.shape]}, k {[*k.shape]} and v {[*v.shape]}, expected are [B, H, D], [B, G, C, D] and the same"
        )
    (batch, heads, width), groups = q.shape, k.shape[1]
    if k.shape[0] != batch or k.shape[3] != width or heads % groups:
        raise ValueError(f"q {[*q.shape]} does not fit k {[*k.shape]}: rows and head size agree, and G divides H")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, expected is one dtype")
    expected = {
        "prefix_len": (prefix_len, (batch,)),
        "core": (core, (batch, core.shape[-1])),
        "core_len": (core_len, (batch,)),
        "text": (text, (batch, groups, text.shape[-1])),
        "text_len": (text_len, (batch, groups)),
    }
    for name, (tensor, shape) in expected.items():
        check_tensor(name, tensor, shape, torch.int32)
    check_last_dimension(q=q, k=k, v=v, core=core, text=text)
    check_contiguous(prefix_len=prefix_len, core_len=core_len, text_len=text_len)
