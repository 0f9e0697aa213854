"""How many threads and processes run a model on a CPU. The only place that decides it. Imports no torch.

The threads of OpenMP wait for each other at the end of every operation. An operation of a small model takes microseconds:
a second thread gains nothing there, and if another process holds one of the cores, every operation waits for it. So small
models take one thread, and an evaluation uses the other cores with more processes. docs/serving.md has measurements.
"""

from __future__ import annotations

import os

from llava.common.machine import available_memory, cores

# Most parameters of a model that runs on one thread. At 17 million a second thread saves no time, at 47 million it saves a
# quarter, also on a busy machine.
SMALL_MODEL = 20_000_000
# Memory of one process beside the weights: torch and transformers, images, activations and the KV cache of a small model.
_PROCESS_BYTES = 1 << 30
_WEIGHT_BYTES = 4  # of a parameter: float32 is the default on a CPU


def is_small(parameters: int | None) -> bool:
    """Return whether a model of so many parameters, None if they are unknown, runs on one thread."""
    return parameters is not None and parameters <= SMALL_MODEL


def threads_for(parameters: int | None, asked: int | None = None) -> int | None:
    """Return the threads of a process that runs a model on a CPU; None where torch's own choice is best.

    parameters: of the model, None if they are unknown or not on a CPU. asked: the value of --threads, which has priority
    over OMP_NUM_THREADS, which has priority over the rule.
    """
    # OMP_NUM_THREADS may be a list, one number per level of nested regions.
    named = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked is None and named.isascii() and named.isdigit() and int(named):
        return int(named)
    if asked is None and is_small(parameters):
        return 1
    return asked


def processes_for(parameters: int | None) -> int:
    """Return the processes that an evaluation on a CPU uses: one per core for a small model, as far as memory allows."""
    if not is_small(parameters):
        return 1
    free = available_memory()
    most = cores() if free is None else free // (_PROCESS_BYTES + _WEIGHT_BYTES * parameters)
    return max(1, min(cores(), most))


def wait_policy() -> str:
    """Return the value of OMP_WAIT_POLICY for a process that runs a model: the user's own, or PASSIVE.

    By default a waiting thread spins, and takes a core from the process that it waits for.
    """
    return os.environ.get("OMP_WAIT_POLICY") or "PASSIVE"


def wait_passively() -> None:
    """Set OMP_WAIT_POLICY for this process. It has an effect only before torch is imported."""
    os.environ["OMP_WAIT_POLICY"] = wait_policy()
