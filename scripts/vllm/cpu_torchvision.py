"""Makes PyPI's torchvision importable beside a CPU build of torch, in the environment of `make vllm`.

PyPI's torchvision is a CUDA build. Its import registers further properties of operators that its compiled part brings, and
fails where that part cannot be loaded. vLLM needs only its transforms, so the operators are declared and never called.
"""

import sysconfig
from pathlib import Path

NAMES = ("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d")
OPERATORS = ("nms", "qnms", "qroi_align", *NAMES, *(f"_{name}_backward" for name in NAMES))
DECLARATIONS = f"""\
import torch

for _name in {OPERATORS!r}:
    torch.library.define("torchvision::" + _name, "(Tensor x) -> Tensor")
"""

package = Path(sysconfig.get_path("purelib")) / "torchvision"
(package / "_declared_operators.py").write_text(DECLARATIONS, encoding="utf-8")
start = package / "__init__.py"
text = start.read_text(encoding="utf-8")
line = "from . import _declared_operators\n"
if not text.startswith(line):
    start.write_text(line + text, encoding="utf-8")
