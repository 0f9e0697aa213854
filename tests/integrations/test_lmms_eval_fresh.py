"""`make lmms-eval` in a fresh clone: an environment with the versions of the lock answers lmms-eval's tasks.

Takes minutes and an index of packages. The environment of the other tests may hold other versions than a new user gets.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
PINNED = r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^ ;]+)"


def in_copy(copy: Path, *command: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MAKEFLAGS", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=copy, env=kept, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fresh_clone(folder: Path) -> Path:
    """The files of the checkout that git would clone, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, target = ROOT / name, folder / name
        if name == ".venv" or not os.path.lexists(source):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target, follow_symlinks=False)
    return folder


def pinned() -> set[tuple[str, str]]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {(canonicalize_name(m["name"]), m["version"]) for line in lines if (m := re.match(PINNED, line))}


def test_fresh_environment(tmp_path):
    """Every version is the lock's, and the answers to the five tasks have the scores that were worked out by hand."""
    copy = fresh_clone(tmp_path / "checkout")
    in_copy(copy, "make", "lmms-eval", f"PYTHON={sys.executable}")
    python = str(copy / ".venv" / "bin" / "python")
    listed = json.loads(in_copy(copy, python, "-m", "pip", "list", "--format", "json"))
    found = {(canonicalize_name(each["name"]), each["version"].partition("+")[0]) for each in listed}
    assert {name for name, _ in found - pinned()} == {"adav", "pip"}
    test = "tests/integrations/test_lmms_eval.py::test_scores_by_hand"
    assert "1 passed" in in_copy(copy, python, "-m", "pytest", test)
