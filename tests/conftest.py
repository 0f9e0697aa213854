"""Settings of all tests. Before any test module is imported, Triton's kernels are sent to its interpreter where there is
no GPU to run them on."""

import gc
import os

import pytest
import torch

# Read once, when triton is first imported (which transformers does). Only tests that ask for the Triton backend meet it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def triton_cache(request):
    """Folder for kernels compiled ahead of time. It stays, so that a second run compiles only what has changed."""
    return request.config.cache.mkdir("triton")


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
