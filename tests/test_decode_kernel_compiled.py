"""The Triton decode kernels compiled ahead of time for A100 and H100 / H200: no spills, 16-byte loads. No GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent / "decode_kernel_aot.py"
VICUNA, MISTRAL, YI_34B = 1, 4, 7  # query heads per KV head


def compiled(variants: list[dict], cache: Path) -> list[dict]:
    """What each kernel of each variant uses. In a process of its own: this one may have the interpreter on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(SCRIPT), *map(json.dumps, variants)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(variants: list[dict], found: list[dict]) -> None:
    assert len(found) == len(variants)
    for variant, kernels in zip(variants, found, strict=True):
        for name, used in kernels.items():
            assert used["local_bytes"] == used["spill_instructions"] == 0, f"{name} of {variant} spills: {used}"
            assert 0 < used["registers"] <= 255 and used["shared_bytes"] <= 99 * 1024, f"{name} of {variant}: {used}"
        # Keys and values at the least; the loads of a narrower kernel would say .64 or .32.
        assert kernels["split"]["wide_loads"] >= 4, f"{variant} reads keys and values in small pieces: {kernels}"


VARIANTS = [
    {"target": target, "dtype": dtype, "group": VICUNA, "width": 128, "scores": scores}
    for target in (80, 90)
    for dtype in ("fp16", "bf16")
    for scores in (True, False)
] + [
    {"target": 80, "dtype": "bf16", "group": MISTRAL, "width": 128, "scores": True},
    {"target": 90, "dtype": "fp16", "group": MISTRAL, "width": 128, "scores": True},
    {"target": 90, "dtype": "fp16", "group": YI_34B, "width": 128, "scores": True, "ones": True},
]
# Four times the block in float32 does not fit into registers.
SPILLS = {"target": 90, "dtype": "fp32", "group": VICUNA, "width": 128, "scores": False, "block": 128}


@pytest.fixture(scope="module")
def usage(tmp_path_factory):
    return compiled([*VARIANTS, SPILLS], tmp_path_factory.mktemp("cache"))


def test_no_spills_at_head_size_128(usage):
    check(VARIANTS, usage[:-1])


def test_a_spill_is_seen(usage):
    """The check above can fail."""
    assert usage[-1]["split"]["spill_instructions"] > 0
    with pytest.raises(AssertionError, match="split of .* spills"):
        check([SPILLS], usage[-1:])


@pytest.mark.long
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_no_spills_at_any_shape(target, dtype, tmp_path):
    variants = [
        {"target": target, "dtype": dtype, "group": group, "width": width, "scores": True}
        for group in (1, 2, 7, 8)
        for width in (64, 80, 112, 128)
    ]
    check(variants, compiled(variants, tmp_path))
