"""Progress bars: rate and remaining time on a terminal, not a byte elsewhere."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest
from eval_data import environment
from report_runs import Bench

LOOP = """
import time
from llava.common.progress import progress_bar
for _ in progress_bar("drawing", range(12), unit=" pictures"):
    time.sleep(0.05)
print("done")
"""
WRITING = """
import pathlib, sys, time
from llava.common.progress import writing_bar
folder = pathlib.Path(sys.argv[1])
(folder / "other.bin").write_bytes(bytes(500))
with writing_bar("writing", folder, 3_000_000):
    with open(folder / "weights.bin", "wb", buffering=0) as file:
        for _ in range(3):
            file.write(bytes(1_000_000))
            time.sleep(0.7)
"""


def on_a_terminal(*command, **variables) -> str:
    """What a command writes to a terminal of 100 columns, as its stderr; its exit code must be 0."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    try:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            env={**environment(), **variables},
        )
        os.close(theirs)
        said, end = b"", time.monotonic() + 120
        while time.monotonic() < end:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not part:
                break
            said += part
        assert process.wait(timeout=60) == 0, said
    finally:
        os.close(ours)
    return said.decode()


def in_a_log(*command, **variables) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env={**environment(), **variables}
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_bar_on_a_terminal_has_rate_and_remaining_time():
    said = on_a_terminal("-c", LOOP)
    assert re.search(r"drawing: +\d+%\|.*\| \d+/12 \[00:00<00:00, +[\d.]+ pictures/s\]", said)
    assert said.startswith("\rdrawing:   0%"), "it is there before the first step ends"
    assert re.search(r"\r +\r$", said), "it is gone when it is done"


def test_a_log_and_other_ranks_get_none():
    assert in_a_log("-c", LOOP) == ""
    assert on_a_terminal("-c", LOOP, RANK="1") == ""
    assert "drawing" in on_a_terminal("-c", LOOP, RANK="0")


def test_what_is_written_is_seen_to_grow(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    said = on_a_terminal("-c", WRITING, tmp_path / "a")
    shares = [int(share) for share in re.findall(r"writing: +(\d+)%", said)]
    assert shares[0] == 0 and shares[-1] == 100 and shares == sorted(shares) and {33, 67} & set(shares)
    assert "B/s" in said
    assert in_a_log("-c", WRITING, tmp_path / "b") == ""


@pytest.fixture
def runs(tmp_path):
    bench = Bench(tmp_path)
    bench.run(method="none")
    bench.run(method="adav", wrong=(0, 3))
    return bench.output


def test_a_command_is_quiet_in_a_log_and_shows_its_steps_on_a_terminal(runs, tmp_path):
    command = ("-m", "llava.eval.report", runs, "-o", tmp_path / "report.html")
    assert in_a_log(*command) == ""
    said = on_a_terminal(*command)
    assert "judging" in said and "bootstrap" in said
