"""What needs a small package imports it where it uses it: a rented machine's image has torch and transformers, and little else."""

import subprocess
import sys

import pytest

from llava.common.errors import UserError
from llava.eval.benchmarks.mmbench import write_upload
from llava.eval.runs.shard_answers import merge

SMALL = ("shortuuid", "openpyxl")
MODULES = (
    *(
        "llava.eval.runs.run",
        "llava.eval.launch",
        "llava.eval.runs.answer_shard",
        "llava.eval.worker",
        "llava.serve.service.batches",
    ),
    *("llava.eval.benchmarks.mmbench", "llava.eval.compare", "test_engine", "test_token_dropping", "cache_policies"),
)


def test_everything_imports_without_small_packages():
    code = (
        f"import importlib, sys; sys.path += ['tests/model', 'tests/support', 'benchmarks']\nfor name in {SMALL}: sys.modules[name] = None\n"
        f"for name in {MODULES}: importlib.import_module(name)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_missing_package_is_a_sentence(tmp_path, monkeypatch):
    for name in SMALL:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="openpyxl, which is not installed: pip install openpyxl"):
        write_upload({}, [], tmp_path / "upload.xlsx")
    with pytest.raises(UserError, match="shortuuid, which is not installed: pip install shortuuid"):
        merge([], {}, tmp_path / "merge.jsonl", "model", "salt")
