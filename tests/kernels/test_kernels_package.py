"""kernels/ is imported as llava.kernels, however the project is installed, and never shadows Hugging Face's `kernels`."""

import os
import zipfile
from pathlib import Path

import pytest
from wheels import ROOT, build, copy_of_what_is_packaged, old_setuptools, python

IMPORT = "import llava.kernels.decode_attention as m; import llava.kernels.decode_attention_triton; print(m.__file__)"


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return copy_of_what_is_packaged(tmp_path_factory.mktemp("tree"))


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
