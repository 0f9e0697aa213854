"""The scripts' torchrun: a user's error comes once, without traceback, and with its exit code."""

import os
import subprocess
import sys

import pytest

from llava.common.files import REPOSITORY

RANK = """\
import os, sys, time
from llava.common.errors import UserError, exits_cleanly

@exits_cleanly
def main():
    print("threads", os.environ["OMP_NUM_THREADS"])
    if {code} == 2:
        raise UserError("--data_path is nowhere.json, allowed is a file")
    sys.exit({code})

main()
"""


@pytest.mark.parametrize(
    ("code", "ends", "said"),
    [
        (2, 2, "error: --data_path is nowhere.json, allowed is a file\n"),
        (3, 1, "ended with exit code 3; what it said is above\n"),
        (0, 0, ""),
    ],
)
def test_ends_as_its_ranks(tmp_path, code, ends, said):
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(code=code))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-m", "llava.common.torchrun", "--standalone", "--nproc-per-node", "2", script],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == ends, done.stderr
    assert done.stderr.count("error: ") == (1 if said else 0) and done.stderr.endswith(said)
    assert "Traceback" not in done.stderr and "***" not in done.stderr
    assert "threads 1" in done.stdout


@pytest.mark.parametrize("script", ["train.sh", "cluster/torchrun.sh", "lmms_eval/run.sh"])
def test_the_scripts_start_it(script):
    text = (REPOSITORY / "scripts" / script).read_text()
    assert "-m llava.common.torchrun" in text and "torch.distributed.run" not in text
