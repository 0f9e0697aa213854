"""Shards: one worker process each, on its own device. The launcher starts them, watches them and ends them.

The launcher holds the write end of every shard's stdin. When the launcher dies, for whatever reason, stdin closes and
the shard ends itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import REPOSITORY
from llava.common.machine import cores, gpus, torch_is_for_cpu
from llava.common.threads import wait_policy
from llava.eval.runs.shard_progress import Progress

# Set by torchrun, `accelerate launch` and scripts/cluster/slurm.sh.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Seconds that a shard has to finish its batch when it is asked to stop. After that it is killed.
GRACE = 20


class ShardFailure(Exception):
    """A shard died. The message says which one and how, and ends with its last lines of output."""


class Interrupted(Exception):
    """The launcher was asked to stop by a signal."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def device_groups(per_model: int = 1, every: bool = False) -> list[str]:
    """Return the devices to run on, as values of CUDA_VISIBLE_DEVICES with `per_model` devices each; [] is the CPU.

    Without CUDA_VISIBLE_DEVICES, the first GPU is used (LLaVA's rule), or all GPUs if `every` (torchrun's rule). No GPU
    is used if torch is a build without CUDA. Raises UserError if the number of devices is no multiple of `per_model`.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        there = [] if torch_is_for_cpu() else [str(i) for i in range(len(gpus()))]
        devices = there if every else there[:1]
        if len(devices) < len(there):
            print(
                f"note: {len(there) - len(devices)} of {len(there)} GPUs stand idle; CUDA_VISIBLE_DEVICES={','.join(there)} "
                "uses all of them",
                file=sys.stderr,
            )
    else:
        devices = [device.strip() for device in named.split(",") if device.strip()]
    # CUDA's rule: an invalid number hides itself and all devices after it.
    if "-1" in devices:
        devices = devices[: devices.index("-1")]
    if devices and len(devices) % per_model:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES names {len(devices)} devices, allowed is a multiple of the {per_model} per model"
        )
    return [",".join(devices[i : i + per_model]) for i in range(0, len(devices), per_model)]


def device_of(shard: int, devices: list[str]) -> str | None:
    """Return the device (or device group) of a shard; None is the CPU. More shards than devices share them in turn."""
    return devices[shard % len(devices)] if devices else None


def worker_command(orders: list[Path], python: str) -> list[str]:
    """Return the command of a worker with these work orders. python: the interpreter that it runs under."""
    return [python, "-m", "llava.eval.worker", "--watch-stdin", *map(str, orders)]


def threads_of_each(shards: int, threads: int | None) -> int:
    """Return the CPU threads of each of `shards` workers of this machine. threads: a number, None divides the cores."""
    # By default each process of torch takes all cores, and the shards would slow each other down.
    return threads or max(1, cores() // shards)


def worker_settings(device: str | None, shards: int, threads: int | None) -> dict[str, str]:
    """Return the environment variables that are set for one of `shards` workers. threads: see threads_of_each."""
    return {
        "CUDA_VISIBLE_DEVICES": device or "",
        "OMP_NUM_THREADS": str(threads_of_each(shards, threads)),
        "OMP_WAIT_POLICY": wait_policy(),
    }


class Shard:
    """A running worker process.

    settings: environment variables of the worker. locks: file descriptors that the worker inherits. log: file that its
    output is appended to. python: the interpreter that it runs under.
    """

    def __init__(
        self,
        name: str,
        settings: dict[str, str],
        orders: list[Path],
        locks: list[int],
        log: Path,
        python: str,
    ):
        device = settings["CUDA_VISIBLE_DEVICES"]
        self.name = f"{name} ({'GPU ' + device if device else 'CPU'})"
        self.last_lines: deque[str] = deque(maxlen=12)
        self.warnings: list[str] = []
        # 1. The environment. A worker is no rank, even if its launcher is one: with these variables set, libraries
        # would look for the other processes.
        environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        environment |= {**settings, "PYTHONUNBUFFERED": "1"}
        if REPOSITORY is not None:  # the launcher's own code, also where it was not installed
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            worker_command(orders, python),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=locks,
            # A terminal sends Ctrl-C to its whole session. In a session of its own the shard does not receive it, and
            # the launcher can let it finish its batch.
            start_new_session=True,
        )
        # 3. The reader of its output. A pipe and not the log file: on a full disk, the file would lose the last lines.
        self._reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self._reader.start()

    def _read(self, log: Path) -> None:
        """Read the output of the worker until it ends: keep the last lines and the warnings, and write the log."""
        try:
            file = open(log, "ab")  # noqa: SIM115 (closed below; the disk may be full from the start)
        except OSError:
            file = None
        # Read on even if nothing can be written: a worker whose pipe is full would stop.
        for line in self.process.stdout:
            text = line.decode(errors="replace").rstrip()
            self.last_lines.append(text)
            if text.startswith("warning: "):
                self.warnings.append(text)
            if file is not None:
                with suppress(OSError):
                    file.write(line)
                    file.flush()
        if file is not None:
            with suppress(OSError):
                file.close()

    def stop(self) -> None:
        """Ask the worker to stop after its batch."""
        if self.process.poll() is None:
            self.process.terminate()

    def wait(self, timeout: float) -> None:
        """Wait for the end of the worker, and kill it after `timeout` seconds."""
        try:
            self.process.wait(max(timeout, 0))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        # Processes that the worker started (vLLM's engine, readers of images) may have outlived it. The worker leads
        # their process group.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def failure(self) -> Exception | None:
        """Return the error of a failed shard: UserError for bad input, ShardFailure for a crash; None if it is well."""
        code = self.process.poll()
        if not code:
            return None
        # The process is gone, but its last lines may still be in the pipe.
        self._reader.join(5)
        said = [line for line in self.last_lines if line.strip()]
        if code == 2 and said and said[-1].startswith("error: "):
            return UserError(f"{self.name}: {said[-1].removeprefix('error: ')}")
        # A negative code is a signal. SIGKILL that nobody sent is most often the kernel's, for lack of memory.
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            how += " (out of memory?)" if -code == signal.SIGKILL else ""
        else:
            how = f"failed with exit code {code}"
        lines = "".join(f"\n  {line}" for line in said) or " (nothing)"
        return ShardFailure(f"{self.name} {how}; its last lines:{lines}")


def run_shards(
    orders: list[list[Path]],
    answers: list[Path],
    devices: list[str],
    locks: list[int],
    logs: list[Path],
    title: str | None,
    todo: int,
    python: str,
    threads: int | None = None,
    first: int = 0,
    place: str = "",
    everywhere: int = 0,
    others: Callable[[], bool] | None = None,
) -> None:
    """Run one shard per entry of `orders` until all are done.

    orders: the work orders of each shard. answers: all files that they append to. devices: see device_groups.
    locks: file descriptors that the workers inherit. logs: one file per shard. title: begins the line of progress;
    None shows no such line. todo: number of samples that will be appended. python: the interpreter of the workers.
    threads: CPU threads of each worker, None divides the cores.

    For a run with shards on other machines: first is the number of the first of these shards; place says where they
    are; everywhere is the number of shards of the whole run; others() is called again and again when these shards are
    done, until it returns True, which means that the other shards are done too.

    If a shard fails, the others finish their batch and stop, and its failure is raised: UserError for bad input,
    ShardFailure for a crash. Raises Interrupted for SIGINT, SIGTERM and SIGHUP. Finished answers stay on disk.
    """
    shards: list[Shard] = []
    with signals_raise(), Progress(title, todo, answers, everywhere or len(orders)) as progress:
        # 1. Start.
        try:
            for i, (order, log) in enumerate(zip(orders, logs, strict=True)):
                name = f"shard {first + i}{place}"
                settings = worker_settings(device_of(i, devices), len(orders), threads)
                shards.append(Shard(name, settings, order, locks, log, python))
            # 2. Watch, until one fails (a non-zero exit code) or all are done.
            while not any(shard.process.poll() for shard in shards):
                running = any(shard.process.poll() is None for shard in shards)
                if not running and (others is None or others()):
                    break
                progress.update()
                progress.notes([text for shard in shards for text in shard.warnings])
                time.sleep(0.1)
            # 3. Look for failures before the others are stopped: these end with a non-zero code too.
            failures = [failure for shard in shards if (failure := shard.failure())]
        finally:
            _stop_all(shards)
            progress.update()
            progress.notes([text for shard in shards for text in shard.warnings])
    if failures:
        # A crash first: it may be the cause of errors that other shards report as bad input.
        raise next((f for f in failures if isinstance(f, ShardFailure)), failures[0])


def _stop_all(shards: list[Shard]) -> None:
    """Ask all shards to stop, and kill those that are not done after GRACE seconds."""
    for shard in shards:
        shard.stop()
    # One deadline for all: they finish their batches at the same time.
    deadline = time.monotonic() + GRACE
    for shard in shards:
        shard.wait(deadline - time.monotonic())


class signals_raise:
    """Context in which the first SIGINT, SIGTERM or SIGHUP raises Interrupted; later ones are ignored."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __enter__(self):
        self._before = {}
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in self.NUMBERS:
                self._before[number] = signal.signal(number, self._raise)

    def _raise(self, number, frame):
        # A second Ctrl-C must not break the clean-up that stops the shards.
        for other in self.NUMBERS:
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)
