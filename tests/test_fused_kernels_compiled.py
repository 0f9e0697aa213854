"""The fused kernels compiled ahead of time for A100 and H100 / H200 at real sizes: no spills, 16-byte accesses. No GPU needed."""

from pathlib import Path

import pytest
from kernel_aot import check_usage, compiled

SCRIPT = Path(__file__).resolve().parent / "fused_kernels_aot.py"
HEADS = {"vicuna-7b": (32, 32), "mistral-7b": (32, 8), "yi-34b": (56, 8)}
WIDTHS = {"vicuna-7b": (4096, 11008), "mistral-7b": (4096, 14336), "vicuna-13b": (5120, 13824), "yi-34b": (7168, 20480)}


def rotations(model):
    """Prefill, a contiguous cache and a listed one."""
    heads, groups = HEADS[model]
    shared = {"kernel": "rotate_append", "heads": heads, "groups": groups}
    for own in ({"tokens": 640, "counted": False}, {"batch": 8}, {"listed": 1000}):
        yield shared | own


def variants(target, dtype, models=WIDTHS):
    found = []
    for model in models:
        hidden, inner = WIDTHS[model]
        found += [{"kernel": "add_rms_norm", "width": hidden, "delta": delta} for delta in (True, False)]
        found.append({"kernel": "silu_mul", "width": inner})
        found += rotations(model) if model in HEADS else []
    return [{"target": target, "dtype": dtype} | variant for variant in found]


def check(variants, found):
    check_usage(variants, found)
    for variant, kernels in zip(variants, found, strict=True):
        (used,) = kernels.values()
        group = variant.get("heads", 0) // variant.get("groups", 1)
        expected = {"add_rms_norm": 3 if variant.get("delta") else 2, "silu_mul": 2, "rotate_append": 2 * (group > 1)}
        assert used["wide_loads"] >= expected[variant["kernel"]], f"{variant} reads in small pieces: {used}"
        assert used["wide_stores"] >= (expected[variant["kernel"]] > 0), f"{variant} writes in small pieces: {used}"


def test_no_spills_at_real_sizes(tmp_path):
    chosen = variants(90, "bfloat16", ("vicuna-7b", "yi-34b")) + variants(80, "float16", ("vicuna-13b", "mistral-7b"))
    check(chosen, compiled(SCRIPT, chosen, tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_no_spills_at_any_real_size(target, dtype, tmp_path):
    chosen = variants(target, dtype)
    check(chosen, compiled(SCRIPT, chosen, tmp_path))
