"""lmms-eval's own model vllm with the plugin: the real tasks' scorers on small data, the demo checkpoint, half of its tokens.

Needs vLLM (make vllm) and lmms-eval in one Python: docs/lmms_eval.md says how to install it there.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from lmms_tasks import SCORES, write_tasks

from llava.common.errors import UserError
from llava.common.find_checkpoint import find_checkpoint
from llava.conversation import single_turn
from llava.eval.runs.engines import RunEngine
from llava.eval.runs.exported import Exported

REPOSITORY = Path(__file__).resolve().parents[2]
try:
    PYTHON = RunEngine.named("vllm").python
except UserError as error:
    pytest.skip(f"vLLM is not there ({error})", allow_module_level=True)
if subprocess.run([PYTHON, "-c", "import lmms_eval"], capture_output=True).returncode:
    pytest.skip(f"{PYTHON} has no lmms-eval", allow_module_level=True)
pytestmark = pytest.mark.long

NAMES = ("adav_docvqa", "adav_ocrbench", "adav_vqav2")


def test_the_scores_are_those_of_the_answers(tmp_path):
    tasks = write_tasks(tmp_path / "tasks")
    checkpoint = Exported(find_checkpoint(str(REPOSITORY / "playground" / "llava-shapes-v1.5")), None, tmp_path)
    checkpoint.write()
    # One turn as the demo was trained; vLLM puts <image> before the text.
    template = tmp_path / "template.jinja"
    template.write_text(single_turn("vicuna_v1", "QUESTION").replace("QUESTION", "{{ messages[0]['content'] }}"))
    environment = {name: value for name, value in os.environ.items() if name not in ("ADAV_CONFIG", "RANK")} | {
        "CKPT": str(checkpoint.folder),
        "MODEL_ARGS": f"dtype=float32,enforce_eager=True,max_model_len=512,chat_template={template}",
        "OUTPUT": str(tmp_path / "out"),
        "VLLM_PYTHON": PYTHON,
        "HF_HOME": str(tmp_path / "hub"),
        "CUDA_VISIBLE_DEVICES": "",
        **dict.fromkeys(("OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1"),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    command = ["bash", str(REPOSITORY / "scripts" / "lmms_eval" / "vllm.sh"), ",".join(NAMES), "72"]
    done = subprocess.run(
        [*command, "--include_path", str(tasks)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = list((tmp_path / "out").rglob("*_results.json"))
    assert len(found) == 1, done.stdout + done.stderr
    results = json.loads(found[0].read_text())["results"]
    for name in NAMES:
        metric, score = SCORES[name]
        assert results[name][f"{metric},none"] == pytest.approx(score), name
