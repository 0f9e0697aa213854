"""kernels/ is imported as llava.kernels, however the project is installed, and never shadows Hugging Face's `kernels`."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMPORT = "import llava.kernels.decode_attention as m; import llava.kernels.decode_attention_triton; print(m.__file__)"


def python(code: str, *paths: Path, cwd: Path) -> str:
    """What a fresh interpreter prints that finds packages in `paths`, the working directory and site-packages."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what is packaged, so that building leaves nothing in the repository."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("llava", "kernels"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


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


def test_link_is_relative_and_kernels_is_no_package():
    assert os.readlink(ROOT / "llava" / "kernels") == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.skipif(old_setuptools() != "", reason=old_setuptools())
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installed(tree, tmp_path, kind):
    wheel = build(tree, kind, tmp_path / "dist")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    assert not (site / "kernels").exists()
    found = Path(python(f"import site; site.addsitedir({str(site)!r}); {IMPORT}", site, cwd=elsewhere))
    assert found == (tree if kind == "editable" else site) / "llava" / "kernels" / "decode_attention.py"


def test_another_package_named_kernels(tmp_path):
    """From the repository's root, where kernels/ lies beside llava/: `kernels` is still the installed package."""
    fake = tmp_path / "kernels"
    fake.mkdir()
    (fake / "__init__.py").write_text("mark = 'not ours'\n")
    code = f"import kernels, transformers.integrations.hub_kernels; print(kernels.mark); {IMPORT}"
    mark, found = python(code, tmp_path, cwd=ROOT).splitlines()
    assert mark == "not ours" and Path(found) == ROOT / "llava" / "kernels" / "decode_attention.py"
