"""Python scripts in processes of their own, for tests of the vLLM plugin."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def rows_of(*command, seconds=900, **environment):
    """What a Python script prints as JSON behind the word "rows". All its processes end with it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *command], env=environment, cwd=ROOT, start_new_session=True, **streams)
    try:
        said, errors = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers of vLLM are processes, too
        process.wait()
    lines = [line for line in said.splitlines() if line.startswith("rows ")]
    assert lines, errors[-2000:]
    return json.loads(lines[0].removeprefix("rows "))
