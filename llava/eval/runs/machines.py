"""One run over several machines: ranks that torchrun, `accelerate launch` or srun started, and a shared folder.

Each rank is a launcher. Rank 0 checks the input, writes the work orders of all shards, merges and scores. Every rank
starts its share of the shards as worker processes on its own devices. All answers are in the shared folder, so the
same command continues the run after a machine died. torch is imported only if there are several ranks.
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from llava.common.errors import UserError
from llava.eval.runs.locks import hold_for_rank
from llava.eval.runs.worker_processes import RANK_VARIABLES, ShardFailure, run_shards

# Timeout of the process group. A rank may wait for the others as long as a run takes, and gloo's default is 30 minutes.
# A rank that dies closes its connections, so the others see an error at once and never wait for this timeout.
PATIENCE = timedelta(days=30)


@dataclass
class Ranks:
    """The ranks of one start of a run, as this process sees them.

    rank, size: number of this process, and of all processes. local_rank, local_size: the same on this machine.
    python: the interpreter of this rank's workers. hosts, devices, shards: one entry per rank; filled by `joined`.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    python: str = field(default_factory=lambda: sys.executable)
    hosts: list[str] = field(default_factory=list)
    devices: list[list[str]] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)
    _told: bool = False
    _arrival: object = None

    @classmethod
    def of_environment(cls) -> Ranks | None:
        """Read the variables of torchrun, `accelerate launch` or scripts/cluster/slurm.sh.

        Returns None if this is the only process. Raises UserError for a missing variable or one out of range.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return None
        missing = [name for name in RANK_VARIABLES if name not in os.environ]
        if missing:
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {missing[0]} is not set; torchrun sets both, and without "
                "WORLD_SIZE there is one process"
            )
        values = []
        for name in RANK_VARIABLES[:4]:
            text = os.environ[name]
            if not text.isascii() or not text.isdigit():
                raise UserError(f'{name} is "{text}", allowed is a whole number')
            values.append(int(text))
        rank, size, local_rank, local_size = values
        if rank >= size or local_rank >= local_size:
            raise UserError(f"RANK {rank} of {size}, LOCAL_RANK {local_rank} of {local_size}: allowed are ranks below")
        return cls(rank, size, local_rank, local_size)

    def share(self, devices: list[str]) -> list[str]:
        """Return this rank's part of the devices (or device groups) of its machine.

        Raises UserError if there are more ranks than devices.
        """
        mine = devices[self.local_rank :: self.local_size]
        if devices and not mine:
            raise UserError(
                f"{self.local_size} ranks share a machine that has devices for {len(devices)}; allowed are at most so many"
            )
        return mine

    @contextmanager
    def joined(self, shards: int, devices: list[str]):
        """Context in which all ranks know each other's host, devices and number of shards.

        shards, devices: those of this rank. If rank 0 leaves before it has given out work, the other ranks receive
        its exit code and end with it.
        """
        import torch.distributed as dist

        # gloo, because only small Python objects are sent, and ranks may have no GPU.
        dist.init_process_group("gloo", timeout=PATIENCE)
        everyone: list = [None] * self.size
        dist.all_gather_object(everyone, (socket.gethostname(), devices, shards))
        self.hosts, self.devices, self.shards = (list(column) for column in zip(*everyone, strict=True))
        code = 1
        try:
            yield
            code = 0
        except UserError:
            code = 2
            raise
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
            raise
        finally:
            # The others wait in `follow` for a broadcast. Without this one they would wait until the timeout.
            if self.rank == 0 and not self._told:
                self._tell({"exit": code})
                self._part()

    def _part(self) -> None:
        """Leave the process group when all ranks are ready to leave it."""
        import torch.distributed as dist

        # A process that ends while it is still a member of the group may abort, which would change its exit code.
        dist.barrier()
        dist.destroy_process_group()

    def _tell(self, work: dict | None) -> dict:
        """Broadcast `work` from rank 0 and return it; the other ranks pass None."""
        import torch.distributed as dist

        word = [work]
        dist.broadcast_object_list(word, src=0)
        self._told = True
        return word[0]

    def lead(self, orders, answers, locks, logs, title, todo, threads, folders: list[Path]) -> None:
        """On rank 0: give out the orders of all shards, and run this rank's share. Returns when all ranks are done."""
        # Absolute paths: the other ranks may have another working directory.
        paths = [[str(path.resolve()) for path in order] for order in orders]
        logs = [log.resolve() for log in logs]
        work = {"orders": paths, "logs": list(map(str, logs)), "folders": [str(f.resolve()) for f in folders]}
        self._tell({**work, "threads": threads})
        self._run([list(map(Path, order)) for order in paths], answers, locks, logs, title, todo, threads)

    def follow(self) -> None:
        """On any other rank: run this rank's share of the shards. Exits if rank 0 gives out an exit code instead."""
        work = self._tell(None)
        if "exit" in work:
            self._part()
            # No message: rank 0 has printed the reason.
            sys.exit(work["exit"])
        locks = [hold_for_rank(Path(folder), self.rank) for folder in work["folders"]]
        try:
            orders = [list(map(Path, order)) for order in work["orders"]]
            # No answer files and no title: the line of progress is on rank 0 alone, which can see all files.
            self._run(orders, [], locks, list(map(Path, work["logs"])), None, 0, work["threads"])
        finally:
            for lock in locks:
                os.close(lock)

    def _run(self, orders, answers, locks, logs, title, todo, threads) -> None:
        """Run this rank's share of `orders`, and leave the process group when all ranks are done."""
        # Shards are numbered over all ranks, rank by rank.
        first = sum(self.shards[: self.rank])
        mine = slice(first, first + self.shards[self.rank])
        run_shards(
            orders[mine],
            answers=answers,
            devices=self.devices[self.rank],
            locks=locks,
            logs=logs[mine],
            title=title,
            todo=todo,
            python=self.python,
            threads=threads,
            first=first,
            everywhere=len(orders),
            place=f" of rank {self.rank} on {self.hosts[self.rank]}",
            others=self._arrived,
        )
        self._part()

    def _arrived(self) -> bool:
        """Return whether all ranks have finished their shards. Called only after this rank has.

        Raises ShardFailure if another rank died.
        """
        import torch.distributed as dist

        # An asynchronous barrier, so that the launcher can still handle signals and show progress while it waits.
        if self._arrival is None:
            self._arrival = dist.barrier(async_op=True)
        if not self._arrival.is_completed():
            return False
        # A barrier that failed counts as completed; only wait() raises its error.
        try:
            self._arrival.wait()
        except RuntimeError as error:
            raise ShardFailure(
                f"another rank died ({str(error).splitlines()[0]}); its own last lines say why"
            ) from None
        return True
