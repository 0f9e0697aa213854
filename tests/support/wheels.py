"""Builds a wheel of the checkout, as pip would, without asking an index."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *paths: Path, cwd: Path) -> str:
    """What a fresh interpreter prints that finds packages in `paths`, the working directory and site-packages."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def copy_of_what_is_packaged(folder: Path) -> Path:
    """Building there leaves nothing in the repository."""
    for name in ("llava", "kernels"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for link in (ROOT / "llava" / "playground").iterdir():
        shutil.copytree(link, folder / "playground" / link.name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def old_setuptools() -> str:
    """Why no wheel can be built with what is installed, or "": pip would bring the version that pyproject.toml asks for."""
    least = int(re.search(r'requires = \["setuptools>=(\d+)"\]', (ROOT / "pyproject.toml").read_text())[1])
    try:
        found = version("setuptools")
    except PackageNotFoundError:
        return f"pyproject.toml builds with setuptools {least} or later, and none is installed"
    new_enough = int(found.split(".")[0]) >= least
    return "" if new_enough else f"pyproject.toml builds with setuptools {least} or later, not with {found}"


def build(tree: Path, kind: str, out: Path) -> Path:
    """The wheel that pip would build: kind is "wheel" or "editable"."""
    out.mkdir()
    python(f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})", cwd=tree)
    (wheel,) = out.glob("*.whl")
    return wheel
