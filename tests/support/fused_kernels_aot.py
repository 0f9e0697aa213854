"""Compile the fused kernels for GPUs that need not be there, and print what they use as JSON lines (kernel_aot.py).

    python tests/support/fused_kernels_aot.py '{"kernel": "silu_mul", "target": 90, "dtype": "bfloat16", "width": 11008}' ...

Keys beside kernel and target: the arguments of the function of that name. With {"each": {"width": [128, 256, ...]}}: how many
kernels calls with each of these values have compiled.
"""

import json
import sys

import torch
from kernel_aot import specialisations, usage_of

from llava.kernels import (
    add_rms_norm_triton,
    evict_triton,
    matvec_triton,
    quick_gelu_triton,
    rank_core_triton,
    rotate_append_triton,
    silu_mul_triton,
)


def add_rms_norm(dtype, width, rows=1, delta=True):
    hidden = torch.empty(rows, width, dtype=dtype)
    add_rms_norm_triton.launch(hidden, hidden if delta else None, hidden[0], 1e-5, hidden if delta else None, hidden)


def silu_mul(dtype, width, rows=1):
    both = torch.empty(rows, 2 * width, dtype=dtype)
    silu_mul_triton.launch(both[:, :width], both[:, width:], both[:, :width].contiguous())


def matvec(dtype, width, rows=4096, gated=False):
    weight, states = torch.empty(rows, width, dtype=dtype), torch.empty(1, width, dtype=dtype)
    matvec_triton.launch(states, weight, None, weight if gated else None, torch.empty(1, rows, dtype=dtype))


def quick_gelu(dtype, width, rows=1):
    hidden = torch.empty(rows, width, dtype=dtype)
    quick_gelu_triton.launch(hidden, hidden)


def rotate_append(dtype, heads, groups, size=128, tokens=1, slots=4096, batch=1, counted=True, listed=0):
    states = torch.empty(batch, tokens, heads + 2 * groups, size, dtype=dtype)
    angles = torch.empty(batch, tokens, size, dtype=dtype)
    keys, values = torch.empty(2, batch, groups, slots, size, dtype=dtype)
    lists = torch.empty(batch, groups, listed, dtype=torch.int32) if listed else None
    counts = torch.ones((batch, groups) if listed else batch, dtype=torch.int32) if counted else None
    rotate_append_triton.launch(
        *states.split([heads, groups, groups], dim=2), angles, angles, keys, values, lists, counts,
        torch.empty(batch, heads, tokens, size, dtype=dtype),
    )  # fmt: skip


def evict(rule, width, groups=32, batch=1):
    scores = torch.empty(batch, groups, width)
    counts = torch.ones(batch, groups, dtype=torch.int32)
    step = torch.ones(1, dtype=torch.int64)
    evict_triton.launch(scores, scores, scores.int(), counts, counts, counts, step, rule, 0.5)


def rank_core(width, most, batch=1):
    scores, counts = torch.empty(batch, width), torch.ones(batch, dtype=torch.int32)
    rank_core_triton.launch(scores, scores.int(), counts, scores[:, :most].int(), counts)


KERNELS = {
    function.__name__: function
    for function in (add_rms_norm, silu_mul, quick_gelu, matvec, rotate_append, evict, rank_core)
}


def answer(kernel, target, each=None, **settings) -> dict:
    """What one line says."""
    if "dtype" in settings:
        settings["dtype"] = getattr(torch, settings["dtype"])
    if each is None:
        return usage_of(lambda: KERNELS[kernel](**settings), target)
    ((name, values),) = each.items()
    return specialisations([lambda v=v: KERNELS[kernel](**settings, **{name: v}) for v in values], target)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps(answer(**json.loads(argument))), flush=True)
