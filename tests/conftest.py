"""Before any test module is imported: Triton's kernels run in its interpreter where there is no GPU to run them on."""

import os

import torch

# Read once, when triton is first imported (which transformers does). Only tests that ask for the Triton backend meet it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
