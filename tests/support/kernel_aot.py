"""Triton kernels compiled for GPUs that need not be there, exactly as their launches would have them compiled.

Where TRITON_INTERPRET is not in the environment: the interpreter compiles nothing. So a test runs a script that uses this
module in a process of its own (`compiled`).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _NoDevice:
    """What a launch asks of Triton's driver before it runs a kernel."""

    def __init__(self, target: int):
        self._target = GPUTarget("cuda", target, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> None:
        return None


@contextmanager
def _instead_of_running(target: int, handle):
    """Calls handle(kernel, args, kwargs) where a kernel would be launched on a GPU of compute capability `target`."""
    original = JITFunction.run
    driver.set_active(_NoDevice(target))
    JITFunction.run = lambda kernel, *args, grid, warmup, **options: handle(original, kernel, args, options)
    try:
        yield
    finally:
        JITFunction.run = original


def usage_of(call, target: int) -> dict[str, dict]:
    """By kernel name, what each kernel that `call` launches uses: registers, local memory (where spills go), 16-byte global
    accesses, shared memory, and in which order loads (LDG), barriers (BAR) and stores (STG) come."""
    found = {}

    def handle(run, kernel, args, options):
        found[kernel.__name__.lstrip("_")] = _usage(run(kernel, *args, grid=(1,), warmup=True, **options))

    with _instead_of_running(target, handle):
        call()
    return found


def specialisations(calls, target: int) -> dict[str, int]:
    """By kernel name, how many different kernels these calls would have compiled."""
    keys: dict[str, set] = {}

    def handle(run, kernel, args, options):
        binder = kernel.device_caches[target][-1]
        _, specialisation, own = binder(*args, **options, debug=False)
        keys.setdefault(kernel.__name__.lstrip("_"), set()).add(f"{specialisation} {own}")

    with _instead_of_running(target, handle):
        for call in calls:
            call()
    return {name: len(found) for name, found in keys.items()}


def _usage(compiled) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        dump = subprocess.run(
            [_BIN / "cuobjdump", "--dump-resource-usage", "--dump-sass", file],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", dump)[1]) for name in ("REG", "STACK", "LOCAL"))
    return {
        "registers": registers,
        "local_bytes": stack + local,
        "spill_instructions": len(re.findall(r"\b(?:STL|LDL)\b", dump)),
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\.E[.\w]*\.128\b", dump)),
        "wide_stores": len(re.findall(r"\bSTG\.E[.\w]*\.128\b", dump)),
        "shared_bytes": compiled.metadata.shared,
        "order": " ".join(name for name, _ in groupby(re.findall(r"\b(LDG|BAR|STG)\b", dump))),
    }


def compiled(script: Path, variants: list[dict], cache: Path) -> list[dict]:
    """What `script` prints for each variant. In a process of its own: this one may have the interpreter on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(script), *map(json.dumps, variants)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_usage(variants: list[dict], found: list[dict]) -> None:
    """No spills, and what fits on a multiprocessor."""
    assert len(found) == len(variants)
    for variant, kernels in zip(variants, found, strict=True):
        for name, used in kernels.items():
            assert used["local_bytes"] == used["spill_instructions"] == 0, f"{name} of {variant} spills: {used}"
            assert 0 < used["registers"] <= 255 and used["shared_bytes"] <= 99 * 1024, f"{name} of {variant}: {used}"
