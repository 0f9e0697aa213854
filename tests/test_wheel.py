"""The wheel works in an environment of its own, outside any checkout: configuration, costs, pictures, chat, runs, compress()."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from wheels import ROOT, build, copy_of_what_is_packaged, old_setuptools

from llava.config import AdaVConfig
from llava.shapes.dataset import write_dataset

pytestmark = pytest.mark.skipif(old_setuptools() != "", reason=old_setuptools())
QUESTION, ANSWER = "What color is the m?", "purple"  # about the first picture of the demo's test split
OVERLAY = ["--methods", "none", "--repeats", "1", "-o", "overlay.png"]
# Runs modules as `python -m` does, in one process: importing torch takes longer than each of them.
IN_TURN = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    print("#", sys.argv[0])
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


class Installed:
    """An environment with the wheel in it; what the wheel needs comes from this one. Commands run in `folder`."""

    def __init__(self, wheel: Path, place: Path):
        venv.create(place / "environment", with_pip=False)
        self.python = place / "environment" / "bin" / "python"
        scheme = {"base": str(place / "environment"), "platbase": str(place / "environment")}
        self.site = Path(sysconfig.get_path("purelib", "venv", scheme))
        zipfile.ZipFile(wheel).extractall(self.site)
        (self.site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        self.folder = place / "elsewhere"
        self.folder.mkdir()

    def run(self, *arguments, text=None) -> str:
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "ADAV_CONFIG", "CKPT")}
        environment = {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        done = subprocess.run(
            [self.python, *map(str, arguments)],
            cwd=self.folder, env=environment, input=text, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        self.stderr = done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    tree = copy_of_what_is_packaged(tmp_path_factory.mktemp("tree"))
    place = tmp_path_factory.mktemp("installed")
    return Installed(build(tree, "wheel", place / "dist"), place)


@pytest.fixture(scope="module")
def picture(installed) -> Path:
    images = write_dataset("v1.6", "test", 8, installed.folder / "shapes") / "images"
    return images / "000001.png"


@pytest.fixture(scope="module")
def said(installed, picture) -> dict[str, str]:
    """Module -> what its command prints. The chat reads the question; "readme" is the README's example of compress()."""
    snippet = re.search(r"```python\n(.*?compress\(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    prompt = re.search(r'prompt = "(.*?)"', snippet)[1]
    snippet = snippet.replace("llava-hf/llava-v1.6-vicuna-7b-hf", "checkpoint").replace("photo.jpg", str(picture))
    snippet = snippet.replace(prompt, f"USER: <image>\\n{QUESTION} ASSISTANT:")
    (installed.folder / "readme.py").write_text(snippet)
    commands = [
        ["llava.costs.flops", "playground/llava-shapes-v1.6", "--overall-tokens", "58"],
        ["llava.serve.overlay", "--image", str(picture), "--question", QUESTION, *OVERLAY],
        ["llava.model.export", "playground/llava-shapes-v1.6", "checkpoint", "--layout", "llava-hf"],
        ["readme"],
        ["llava.serve.cli", "--image", str(picture)],
    ]
    out = installed.run("-c", IN_TURN, json.dumps(commands), text=QUESTION + "\n")
    parts = re.split(r"^# (\S+)\n", out, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_configuration_is_the_defaults(installed):
    assert json.loads(installed.run("-m", "llava.config")) == AdaVConfig().to_dict()
    code = "from llava.config import AdaVConfig as C; import llava; print(C.load(overall_tokens=7).overall_tokens, llava.__file__)"
    assert installed.run("-c", code).split() == ["7", str(installed.site / "llava" / "__init__.py")]


def test_costs_of_the_demo_checkpoint(said):
    assert "744 vision tokens of 5 tiles -> 58.0 in the mean layer" in said["llava.costs.flops"]


def test_overlay_and_chat(said, installed):
    assert said["llava.serve.overlay"].startswith(f"none: {ANSWER}\n")
    assert (installed.folder / "overlay.png").is_file()
    assert ANSWER in said["llava.serve.cli"]


def test_runs_and_data_go_under_the_working_directory(installed):
    before = sorted(installed.site.rglob("*"))
    installed.run("-m", "llava.eval.launch", "shapes", "14", "--family", "demo", "--limit", "4")
    assert "shapes: 4 questions; all 4,000 of one tile with 14 tokens take one to two minutes" in installed.stderr
    (score,) = installed.folder.glob("runs/shapes/llava-shapes-v1.5/*/score.json")
    assert json.loads(score.read_text())["questions"] == 4
    assert (installed.folder / "playground" / "data" / "eval" / "shapes-v1.5" / "questions.jsonl").is_file()
    assert sorted(installed.site.rglob("*")) == before


def test_compress_as_the_readme_has_it(said):
    assert said["readme"].split()[-1] == ANSWER


def test_a_checkout_is_its_own_place():
    """From any working directory: what the scripts promise."""
    code = "from llava.common.files import BASE, REPOSITORY; print(BASE == REPOSITORY, REPOSITORY)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True)
    assert out.stdout.split() == ["True", str(ROOT)]
