"""One shard of an evaluation: loads the checkpoint once, answers its samples in batches, appends each batch at once.

    python -m llava.eval.worker ORDER.json [ORDER.json ...]

llava.eval.launch starts it, writes the work orders, and merges the answers. One worker may have orders of several
configurations of one checkpoint. torch is imported last, so that a worker whose launcher is gone ends at once.
The order says whether this repository's engine answers or vLLM.
Exit codes: 0 done, 2 bad input (one sentence on stderr), 143 stopped by SIGTERM, after the current batch.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import warnings
from typing import TYPE_CHECKING

from llava.common.errors import exits_cleanly
from llava.eval.runs.work_order import WorkOrder

if TYPE_CHECKING:
    from llava.eval.runs.answerer import Answerer

# 128 + 15: the exit code of a shell for a process that SIGTERM ended.
STOPPED = 143


def _end_with_the_launcher() -> None:
    """Start a thread that ends this process when the launcher's end of stdin closes.

    stdin closes whenever the launcher dies, also by SIGKILL. Nobody would merge further answers.
    """

    def watch():
        while os.read(0, 1):
            pass
        # vLLM's engine is a process of its own, which would stay. A worker of the launcher leads its process group.
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        # sys.exit would end only this thread.
        os._exit(STOPPED)

    threading.Thread(target=watch, daemon=True).start()


def answerer_for(order: WorkOrder) -> Answerer:
    """Load the checkpoint of `order` into the engine that is to answer it."""
    # Each engine is installed in its own Python, so only the one that is needed is imported.
    if order.for_vllm is None:
        from llava.eval.runs.answer_shard import ShardAnswerer

        return ShardAnswerer(order)
    from llava.eval.runs.answer_on_vllm import VllmAnswerer

    return VllmAnswerer(order)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.worker", description=__doc__.split("\n")[0])
    parser.add_argument("orders", nargs="+", help="work orders that llava.eval.launch writes, all of one checkpoint")
    parser.add_argument("--watch-stdin", action="store_true", help="stop when stdin is closed")
    args = parser.parse_args(argv)
    if args.watch_stdin:
        _end_with_the_launcher()
    orders = [WorkOrder.read(path) for path in args.orders]
    # The launcher shows lines that begin with "warning: ". All other output goes to the shard's log.
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    answerer = answerer_for(orders[0])
    # Not earlier: before the first batch there is nothing to finish, and SIGTERM may end the process at once.
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    for order in orders:
        answerer.run(order, stopping)
    if stopping.is_set():
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
