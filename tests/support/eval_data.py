"""A small VQAv2 in LLaVA's layout, and the launcher as a command, for the tests of the evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
SPLIT = "llava_vqav2_mscoco_test-dev2015"
QUESTIONS = ("What colour is the shape on the left?", "How many digits are there in the picture?", "Yes?")
SUFFIX = "\nAnswer the question using a single word or phrase."


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_vqav2(root: Path, questions: int = 12, images: int = 4) -> Path:
    """Questions over a few small pictures, the last one without image; the whole split holds one question more."""
    folder = root / "vqav2"
    (folder / "test2015").mkdir(parents=True)
    names = [f"COCO_test2015_{i:012d}.jpg" for i in range(images)]
    for i, name in enumerate(names):
        Image.effect_noise((60 + 3 * i, 50 + 7 * i), 80).convert("RGB").save(folder / "test2015" / name)
    rows = [
        {"question_id": 1000 + i, "image": names[i % images], "text": QUESTIONS[i % 3] + SUFFIX, "category": "default"}
        for i in range(questions - 1)
    ]
    rows.append({"question_id": 9000, "text": QUESTIONS[2]})
    write_rows(folder / f"{SPLIT}.jsonl", rows)
    write_rows(folder / "llava_vqav2_mscoco_test2015.jsonl", [*rows, {"question_id": 9999, "text": "not asked"}])
    return root


def make_folder_only_checkpoint(folder: Path, **settings) -> Path:
    """What the launcher sees of a checkpoint before a worker loads it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "image_aspect_ratio": "pad", **settings}))
    return folder


def scripts() -> Path:
    """The folder of the scripts; where sys.executable is warm (conftest.py), a link to it, beside which they find it."""
    beside = Path(sys.executable).parents[2] / "scripts"
    return beside if beside.is_symlink() else REPOSITORY / "scripts"


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "llava.eval.launch", *map(str, arguments)]


def environment() -> dict:
    """Without what a developer's shell may have set for the evaluation."""
    drop = ("CKPT", "CONV_MODE", "DATA_ROOT", "ADAV_CONFIG", "GPUS_PER_MODEL", "SUBSET", "JUDGE_URL", "JUDGE_MODEL")
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def make_place(folder: Path, monkeypatch) -> None:
    """Make `folder` the current one, with a checkpoint "llava" and a "config.json", in the environment of `launch`."""
    for name in set(os.environ) - set(environment()):
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(folder)
    make_folder_only_checkpoint(folder / "llava")
    (folder / "config.json").write_text("{}")


def launch(*arguments, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, timeout=timeout, **options
    )
