"""One run over several machines: ranks that torchrun, `accelerate launch` or srun started, and a folder that all can see.

Each rank is the launcher itself. Rank 0 checks the input, writes the work orders of all shards, merges and scores; every
rank starts its share of the shards as worker processes on its own devices. Whatever is answered lies in the shared folder,
so a run whose machine died goes on with the same command. torch is imported only where there are several ranks.
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

PATIENCE = timedelta(days=30)  # ranks wait for each other as long as a run takes; one that dies ends the others at once


@dataclass
class Ranks:
    """This process among those of one start of a run.

    rank of size processes; local_rank of local_size on this machine. shards: per rank, once all have joined.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    hosts: list[str] = field(default_factory=list)
    devices: list[list[str]] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)
    _told: bool = False
    _arrival: object = None

    @classmethod
    def of_environment(cls) -> Ranks | None:
        """What torchrun, `accelerate launch` or scripts/cluster/slurm.sh say; None where this is the only process."""
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
        """This rank's part of the devices (or device groups) of its machine."""
        mine = devices[self.local_rank :: self.local_size]
        if devices and not mine:
            raise UserError(
                f"{self.local_size} ranks share a machine that has devices for {len(devices)}; allowed are at most so many"
            )
        return mine

    @contextmanager
    def joined(self, shards: int, devices: list[str]):
        """Within it, all ranks know each other; each brings that many shards on those devices.

        However rank 0 leaves before it has given out work, the others learn of it and end with the same exit code.
        """
        import torch.distributed as dist

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
            if self.rank == 0 and not self._told:
                self._tell({"exit": code})
                self._part()

    def _part(self) -> None:
        """Leave the others, once all are here: a process that ends as a member of the group may abort."""
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()

    def _tell(self, work: dict | None) -> dict:
        """Rank 0's word to all; the others pass None."""
        import torch.distributed as dist

        word = [work]
        dist.broadcast_object_list(word, src=0)
        self._told = True
        return word[0]

    def lead(self, orders, answers, locks, logs, title, todo, folders: list[Path]) -> None:
        """Rank 0: give out the orders of all shards and carry out its own; returns when every rank is done."""
        paths = [[str(path.resolve()) for path in order] for order in orders]
        logs = [log.resolve() for log in logs]
        self._tell({"orders": paths, "logs": list(map(str, logs)), "folders": [str(f.resolve()) for f in folders]})
        self._run([list(map(Path, order)) for order in paths], answers, locks, logs, title, todo)

    def follow(self) -> None:
        """Any other rank: carry out its share of what rank 0 gives out."""
        work = self._tell(None)
        if "exit" in work:
            self._part()
            sys.exit(work["exit"])  # rank 0 has said why
        locks = [hold_for_rank(Path(folder), self.rank) for folder in work["folders"]]
        try:
            orders = [list(map(Path, order)) for order in work["orders"]]
            self._run(orders, [], locks, list(map(Path, work["logs"])), None, 0)
        finally:
            for lock in locks:
                os.close(lock)

    def _run(self, orders, answers, locks, logs, title, todo) -> None:
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
            first=first,
            everywhere=len(orders),
            place=f" of rank {self.rank} on {self.hosts[self.rank]}",
            others=self._arrived,
        )
        self._part()

    def _arrived(self) -> bool:
        """Whether all ranks have carried out their shards; asked only once this one has."""
        import torch.distributed as dist

        if self._arrival is None:
            self._arrival = dist.barrier(async_op=True)
        if not self._arrival.is_completed():
            return False
        try:
            self._arrival.wait()
        except RuntimeError as error:
            raise ShardFailure(
                f"another rank died ({str(error).splitlines()[0]}); its own last lines say why"
            ) from None
        return True
