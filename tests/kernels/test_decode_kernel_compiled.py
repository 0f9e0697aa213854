"""The Triton decode kernels compiled ahead of time for A100 and H100 / H200: no spills, 16-byte loads. No GPU needed."""

from itertools import islice
from pathlib import Path

import pytest
from kernel_aot import check_usage, compiled

from llava.kernels.decode_attention_triton import choose_splits

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "decode_kernel_aot.py"
VICUNA, MISTRAL, YI_34B = 1, 4, 7  # query heads per KV head
CAPACITIES = [*range(128, 3201, 128), 1000, 2929, 3001]


def check(variants: list[dict], found: list[dict]) -> None:
    check_usage(variants, found)
    for variant, kernels in zip(variants, found, strict=True):
        # Keys and values at the least; the loads of a narrower kernel would say .64 or .32.
        assert kernels["split"]["wide_loads"] >= 4, f"{variant} reads keys and values in small pieces: {kernels}"


# Half of the eight combinations, with every pair of settings in one of them; the long test below has all.
VARIANTS = [
    {"target": target, "dtype": dtype, "group": VICUNA, "width": 128, "scores": scores}
    for target, dtype, scores in (
        (80, "float16", True),
        (80, "bfloat16", False),
        (90, "float16", False),
        (90, "bfloat16", True),
    )
] + [
    {"target": 80, "dtype": "bfloat16", "group": MISTRAL, "width": 128, "scores": True},
    {"target": 90, "dtype": "float16", "group": MISTRAL, "width": 128, "scores": True},
    {"target": 90, "dtype": "float16", "group": YI_34B, "width": 128, "scores": True, "large": True},
]
# Four times the block in float32 does not fit into registers.
SPILLS = {"target": 90, "dtype": "float32", "group": VICUNA, "width": 128, "scores": False, "block": 128}


COUNTED = {group: {"capacities": CAPACITIES, "group": group} for group in (VICUNA, MISTRAL)}


@pytest.fixture(scope="module")
def found(triton_cache):
    """What the script says about VARIANTS, SPILLS and COUNTED of Vicuna: one process, whose imports take seconds."""
    lines = iter(compiled(SCRIPT, [*VARIANTS, SPILLS, COUNTED[VICUNA]], triton_cache))
    return [list(islice(lines, count)) for count in (len(VARIANTS), 1, 1)]


def test_no_spills_at_head_size_128(found):
    check(VARIANTS, found[0])


def test_a_spill_is_seen(found):
    """The check above can fail."""
    assert found[1][0]["split"]["spill_instructions"] > 0
    with pytest.raises(AssertionError, match="split of .* spills"):
        check([SPILLS], found[1])


def check_counts(group: int, kernels: dict) -> None:
    splits = {choose_splits(32 // group, slots, 132) for slots in CAPACITIES}
    assert splits == {2, 4, 8, 16, 32}
    assert kernels == {"split": len(splits), "reduce": len(splits)}


def test_few_kernels_for_all_capacities(found):
    """Compiling takes a second in the middle of a request: one kernel per number of splits, and none per length of a list."""
    check_counts(VICUNA, found[2][0])


@pytest.mark.long
def test_few_kernels_for_all_capacities_of_grouped_heads(triton_cache):
    check_counts(MISTRAL, compiled(SCRIPT, [COUNTED[MISTRAL]], triton_cache)[0])


def test_number_of_splits():
    """Enough programs for every multiprocessor, and at least a block of 32 entries for each."""
    for sequences in (1, 8, 32, 56, 256, 1024, 5000):
        for slots in (0, 1, 63, 64, 128, 191, 192, 640, 3200, 100_000):
            splits = choose_splits(sequences, slots, 132)
            assert splits in (1, 2, 4, 8, 16, 32)
            assert splits == 1 or slots / splits >= 32
            enough = sequences * splits >= 4 * 132 or splits == 32
            assert enough or slots / splits < 128


@pytest.mark.long
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_no_spills_at_any_shape(target, dtype, triton_cache):
    variants = [
        {"target": target, "dtype": dtype, "group": group, "width": width, "scores": scores}
        for group in (1, 2, 7, 8)
        for width in (64, 80, 112, 128)
        for scores in ((True, False) if (group, width) == (VICUNA, 128) else (True,))
    ]
    check(variants, compiled(SCRIPT, variants, triton_cache))
