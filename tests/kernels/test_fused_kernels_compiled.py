"""The fused kernels compiled ahead of time for A100 and H100 / H200 at real sizes: no spills, 16-byte accesses. No GPU needed."""

from pathlib import Path

import pytest
from kernel_aot import check_usage, compiled

from llava.kernels.evict import RULES

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "fused_kernels_aot.py"
HEADS = {"vicuna-7b": (32, 32), "mistral-7b": (32, 8), "yi-34b": (56, 8)}
WIDTHS = {"vicuna-7b": (4096, 11008), "mistral-7b": (4096, 14336), "vicuna-13b": (5120, 13824), "yi-34b": (7168, 20480)}


def rotations(model):
    """Prefill, a contiguous cache and a listed one."""
    heads, groups = HEADS[model]
    shared = {"kernel": "rotate_append", "heads": heads, "groups": groups}
    for own in ({"tokens": 640, "counted": False}, {"batch": 8}, {"listed": 1000}):
        yield shared | own


def layers(target, dtype, models=WIDTHS):
    """What a layer of each model launches."""
    found = []
    for model in models:
        hidden, inner = WIDTHS[model]
        found += [{"kernel": "add_rms_norm", "width": hidden, "delta": delta} for delta in (True, False)]
        found.append({"kernel": "silu_mul", "width": inner})
        found += [{"kernel": "matvec", "width": width, "gated": width == hidden} for width in (hidden, inner)]
        found += rotations(model) if model in HEADS else []
    return [{"target": target, "dtype": dtype} | variant for variant in found]


def tower(target, dtype):
    """What an MLP of the vision tower launches, CLIP-L at 336 pixels."""
    return [{"target": target, "dtype": dtype, "kernel": "quick_gelu", "width": 4096, "rows": 577}]


def lists(target, widths):
    """What a layer with a cache policy launches."""
    found = [{"kernel": "evict", "rule": rule, "width": width} for rule in RULES for width in widths]
    found += [{"kernel": "rank_core", "width": width, "most": width // 3} for width in widths]
    return [{"target": target} | variant for variant in found]


def check(variants, found):
    check_usage(variants, found)
    for variant, kernels in zip(variants, found, strict=True):
        (used,) = kernels.values()
        group = variant.get("heads", 0) // variant.get("groups", 1)
        loads = {
            "add_rms_norm": 3 if variant.get("delta") else 2,
            "silu_mul": 2,
            "quick_gelu": 2,
            "matvec": 8,
            "rotate_append": 2 * (group > 1),
        }.get(variant["kernel"], 0)
        assert used["wide_loads"] >= loads, f"{variant} reads in small pieces: {used}"
        # A program of matvec writes two numbers.
        assert used["wide_stores"] >= (loads > 0 and variant["kernel"] != "matvec"), (
            f"{variant} writes in small pieces: {used}"
        )
        # Entries of a list move from thread to thread: all are read before any is written.
        assert variant["kernel"] != "evict" or used["order"].endswith("LDG BAR STG"), f"{variant}: {used}"


CHOSEN = layers(90, "bfloat16", ("vicuna-7b", "yi-34b")) + layers(80, "float16", ("vicuna-13b",))
CHOSEN += tower(90, "bfloat16") + tower(80, "float16") + lists(90, (3200,))
CAPACITIES = [*range(128, 3201, 128), 1000, 2929, 3001]
# Calls, and how many kernels they may have compiled: lists are padded to one of two sizes.
FEW = [
    ({"kernel": "evict", "rule": "centred", "each": {"width": CAPACITIES}}, 2),
    ({"kernel": "rank_core", "most": 100, "each": {"width": CAPACITIES}}, 2),
    ({"kernel": "rotate_append", "heads": 32, "groups": 32, "each": {"slots": CAPACITIES}}, 1),
    ({"kernel": "rotate_append", "heads": 32, "groups": 32, "each": {"listed": CAPACITIES}}, 1),
    ({"kernel": "rotate_append", "heads": 32, "groups": 32, "counted": False, "each": {"tokens": [1, 7, 640]}}, 1),
    ({"kernel": "silu_mul", "width": 11008, "each": {"rows": [1, 7, 640]}}, 1),
    ({"kernel": "quick_gelu", "width": 4096, "each": {"rows": [1, 577, 2885]}}, 1),
    ({"kernel": "add_rms_norm", "width": 4096, "each": {"rows": [1, 7, 640]}}, 1),
]


@pytest.fixture(scope="module")
def found(triton_cache):
    """What the script says about CHOSEN and FEW: one process, whose imports take seconds."""
    calls = [{"target": 90} | call for call, _ in FEW]
    for call in calls:
        if call["kernel"] not in ("evict", "rank_core"):
            call["dtype"] = "bfloat16"
    lines = compiled(SCRIPT, CHOSEN + calls, triton_cache)
    return lines[: len(CHOSEN)], lines[len(CHOSEN) :]


def test_no_spills_at_real_sizes(found):
    check(CHOSEN, found[0])


def test_few_kernels_for_all_capacities(found):
    """Compiling takes a second in the middle of a request."""
    for (call, most), counted in zip(FEW, found[1], strict=True):
        assert counted == {call["kernel"]: most}, call


@pytest.mark.long
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_no_spills_at_any_real_size(target, dtype, triton_cache):
    chosen = layers(target, dtype) + tower(target, dtype)
    check(chosen, compiled(SCRIPT, chosen, triton_cache))


@pytest.mark.long
@pytest.mark.parametrize("target", [80, 90])
def test_no_spills_at_any_length_of_the_lists(target, triton_cache):
    chosen = lists(target, (128, 3200, 8000))
    check(chosen, compiled(SCRIPT, chosen, triton_cache))
