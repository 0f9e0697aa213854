"""torchrun whose failures a user can read: python -m llava.common.torchrun [flags of torchrun] -m MODULE [arguments]

The scripts start several ranks with it. What ended a rank, that rank has said already: torchrun's own traceback and log lines
about its child processes add nothing. Exit codes: 2 bad input (one sentence), 1 a rank died, 128 + n stopped by signal n.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: list[str] | None = None) -> None:
    args = run.parse_args(argv)
    if run.determine_local_world_size(args.nproc_per_node) > 1:
        # torchrun sets the same, with a paragraph about it; a user's own value stands.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code == 2:  # bad input, told in one sentence
            sys.exit(2)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        print(f"error: rank {rank} {how}; what it said is above", file=sys.stderr)
        sys.exit(1)
    except SignalException as error:
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    main()
