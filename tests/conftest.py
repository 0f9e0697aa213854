"""Settings of all tests. Before any test module is imported, Triton's kernels are sent to its interpreter where there is
no GPU to run them on."""

import gc
import os
import sys

import pytest
import torch
from eval_data import environment
from warm_python import WarmPython

# Read once, when triton is first imported (which transformers does). Only tests that ask for the Triton backend meet it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# The launcher sets it for its workers (llava/common/threads.py). They start warm only if the warm Python has it too.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


@pytest.fixture(scope="session")
def triton_cache(request):
    """Folder for kernels compiled ahead of time. It stays, so that a second run compiles only what has changed."""
    return request.config.cache.mkdir("triton")


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory):
    with WarmPython(tmp_path_factory.mktemp("warm"), environment()) as server:
        yield server


@pytest.fixture(scope="module")
def warm(warm_python):
    """Let sys.executable be a Python that has imported torch and transformers already (warm_python.py).

    Commands of the module's tests, and the workers that they start, then take no seconds to start. Each kind of command
    has one test with the fixture `cold`, which sees a start that is broken.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_python.executable)
        yield warm_python


COLD = sys.executable


@pytest.fixture
def cold(monkeypatch):
    """Undo `warm` for one test."""
    monkeypatch.setattr(sys, "executable", COLD)


def pytest_collection_finish():
    """Take what the imports have made out of the garbage collector's sight.

    Without it, each gc.collect() of a test or of a benchmark goes through all objects of torch and transformers, which
    takes half a second.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Give it back: an interpreter that ends with frozen objects reports the leaks of every extension module."""
    gc.unfreeze()


@pytest.fixture
def tables():
    """The tables of methods, which are as before after the test."""
    from llava.methods import plugins
    from llava.methods.before_llm import SELECTORS
    from llava.methods.inside_llm import DROPPERS

    before = [(table, dict(table)) for table in (SELECTORS, DROPPERS, plugins._REGISTERED)]
    yield
    for table, content in before:
        table.clear()
        table.update(content)
