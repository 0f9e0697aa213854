"""Shards: one worker process each, on a device of its own; started, watched, and never left behind.

The launcher holds the write end of every shard's stdin, so that a shard ends with the launcher however that dies.
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
from llava.eval.runs.shard_progress import Progress

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GRACE = 20  # seconds that a shard has to finish its batch when it is asked to stop


class ShardFailure(Exception):
    """A shard died. The message names it, says how, and ends with its last lines."""


class Interrupted(Exception):
    """The launcher was asked to stop by a signal."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def device_groups(per_model: int = 1, every: bool = False) -> list[str]:
    """Devices to run on, as values of CUDA_VISIBLE_DEVICES, `per_model` in each; [] is the CPU.

    Without CUDA_VISIBLE_DEVICES the first GPU is used, where there is one (LLaVA's rule) and torch can use it; `every`
    takes all of them (torchrun's rule).
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
    if "-1" in devices:  # CUDA's rule: whatever comes after an invalid number is hidden
        devices = devices[: devices.index("-1")]
    if devices and len(devices) % per_model:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES names {len(devices)} devices, allowed is a multiple of the {per_model} per model"
        )
    return [",".join(devices[i : i + per_model]) for i in range(0, len(devices), per_model)]


def device_of(shard: int, devices: list[str]) -> str | None:
    """The device (or group) of a shard; None is the CPU. More shards than devices share them in turn."""
    return devices[shard % len(devices)] if devices else None


def worker_command(orders: list[Path]) -> list[str]:
    return [sys.executable, "-m", "llava.eval.worker", "--watch-stdin", *map(str, orders)]


def worker_settings(device: str | None, shards: int) -> dict[str, str]:
    """What the environment of one of `shards` workers has of its own; a user's OMP_NUM_THREADS stands."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // shards))
    return {"CUDA_VISIBLE_DEVICES": device or "", "OMP_NUM_THREADS": threads}


class Shard:
    """A running worker."""

    def __init__(self, name: str, device: str | None, orders: list[Path], shards: int, locks: list[int], log: Path):
        self.name = f"{name} ({'CPU' if device is None else 'GPU ' + device})"
        self.last_lines: deque[str] = deque(maxlen=12)
        self.warnings: list[str] = []
        # A worker is a process by itself, also where its launcher is one of several ranks.
        environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        environment |= {**worker_settings(device, shards), "PYTHONUNBUFFERED": "1"}
        if REPOSITORY is not None:  # the launcher's own code, also where it was not installed
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            worker_command(orders),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=locks,
            start_new_session=True,  # a Ctrl-C reaches the launcher alone, which lets the shards finish their batches
        )
        # Read here and not by a file: on a full disk the shard's last words would be lost.
        self._reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self._reader.start()

    def _read(self, log: Path) -> None:
        try:
            file = open(log, "ab")  # noqa: SIM115 (closed below; the disk may be full from the start)
        except OSError:
            file = None
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
        if self.process.poll() is None:
            self.process.terminate()

    def wait(self, timeout: float) -> None:
        try:
            self.process.wait(max(timeout, 0))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def failure(self) -> Exception | None:
        """What to raise if the shard failed: a UserError for bad input, a ShardFailure for a crash."""
        code = self.process.poll()
        if not code:
            return None
        self._reader.join(5)
        said = [line for line in self.last_lines if line.strip()]
        if code == 2 and said and said[-1].startswith("error: "):
            return UserError(f"{self.name}: {said[-1].removeprefix('error: ')}")
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
    first: int = 0,
    place: str = "",
    everywhere: int = 0,
    others: Callable[[], bool] | None = None,
) -> None:
    """Run one shard per entry of `orders` until all are done.

    orders: work orders of each shard. answers: all files that they append to. todo: samples that will be appended.
    title: of the line of progress; None shows none. Where the run has shards on other machines too: first, place: number
    of the first of these and where they are, for their names; everywhere: how many there are; others: asked again and
    again once these are done, until it says that the others are as well.
    If a shard fails, the others finish their batch and stop, and its failure is raised; what is answered stays.
    """
    shards: list[Shard] = []
    with _signals_raise(), Progress(title, todo, answers, everywhere or len(orders)) as progress:
        try:
            for i, (order, log) in enumerate(zip(orders, logs, strict=True)):
                name = f"shard {first + i}{place}"
                shards.append(Shard(name, device_of(i, devices), order, len(orders), locks, log))
            while not any(shard.process.poll() for shard in shards):
                running = any(shard.process.poll() is None for shard in shards)
                if not running and (others is None or others()):
                    break
                progress.update()
                progress.notes([text for shard in shards for text in shard.warnings])
                time.sleep(0.1)
            failures = [failure for shard in shards if (failure := shard.failure())]
        finally:
            _stop_all(shards)
            progress.update()
            progress.notes([text for shard in shards for text in shard.warnings])
    if failures:
        # One crash says more than the bad input that others may report because of it.
        raise next((f for f in failures if isinstance(f, ShardFailure)), failures[0])


def _stop_all(shards: list[Shard]) -> None:
    for shard in shards:
        shard.stop()
    deadline = time.monotonic() + GRACE
    for shard in shards:
        shard.wait(deadline - time.monotonic())


class _signals_raise:
    """Within it, SIGINT, SIGTERM and SIGHUP raise Interrupted, once; a second signal waits for the clean-up."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __enter__(self):
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in self.NUMBERS:
                self._before[number] = signal.signal(number, self._raise)

    def _raise(self, number, frame):
        for other in self.NUMBERS:
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)
