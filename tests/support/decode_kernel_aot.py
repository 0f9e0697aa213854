"""Compile the Triton decode kernels for GPUs that need not be there, and print what they use as JSON lines (kernel_aot.py).

    python tests/support/decode_kernel_aot.py '{"target": 90, "dtype": "float16", "group": 1, "width": 128, "scores": true}' ...

Optional keys: block, warps, stages; and large: true for storage whose rows are more than 2^31 elements apart. Or
{"capacities": [128, 256, ...], "group": 1}: how many kernels requests of these capacities have compiled, at batch 1.
"""

import json
import sys
from dataclasses import replace

import torch
from kernel_aot import specialisations, usage_of
from torch import Tensor

from llava.kernels import decode_attention_triton as kernels
from llava.kernels.decode_attention import DecodeOutput

_GROUPS, _SPLITS, _H100 = 8, 16, 132


def launch(k: Tensor, group: int, scores: bool, splits: int, listed: int, changes: dict | None = None) -> None:
    """One call of both kernels on storage k [B, G, C, D] with lists of `listed` entries; changes: of the tuning."""
    batch, groups, _, width = k.shape
    q = torch.empty(batch, groups * group, width, dtype=k.dtype)
    counts = torch.zeros(batch, groups, dtype=torch.int32)
    core, text = (torch.zeros(*shape, listed, dtype=torch.int32) for shape in ((batch,), (batch, groups)))
    workspace = kernels.Workspace.empty(q, k, core, text, splits)
    workspace = replace(workspace, tuning=replace(kernels.tuning_for(group, k.dtype), **changes or {}))
    out = DecodeOutput.empty(q, core, text, scores)
    lengths = counts[:, 0].contiguous()
    kernels.launch(q, k, k, lengths, core, lengths, text, counts, 0.1, scores, out, workspace)


def variant(target, dtype, group, width, scores, large=False, **changes) -> dict:
    """What both kernels use at one setting."""
    dtype, slots = getattr(torch, dtype), 1000
    k = torch.empty(1, _GROUPS, slots, width, dtype=dtype)
    if large:
        k = torch.empty(2**31 + k.numel(), dtype=dtype).as_strided((2, *k.shape[1:]), (2**31, *k.stride()[1:]))
    return usage_of(lambda: launch(k, group, scores, _SPLITS, 640, changes), target)


def kernels_compiled(capacities, group, target=90) -> dict[str, int]:
    """By kernel, how many are compiled for requests of these capacities on an H100: lists are as long as the cache."""

    def request(slots: int) -> None:
        k = torch.empty(1, 32 // group, slots, 128, dtype=torch.bfloat16)
        launch(k, group, False, kernels.choose_splits(k.shape[1], slots, _H100), slots)

    return specialisations([lambda slots=slots: request(slots) for slots in capacities], target)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        settings = json.loads(argument)
        print(json.dumps((kernels_compiled if "capacities" in settings else variant)(**settings)), flush=True)
