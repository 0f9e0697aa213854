"""docs/transformers.md has one snippet per family, and each of them runs (on a tiny random model of the family)."""

import re
from pathlib import Path

import pytest
import transformers
from family_cases import CASES
from family_processor import TinyProcessor

from llava.integrations.transformers import FAMILIES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
# Checkpoint of a snippet -> the tiny model in its place.
CHECKPOINTS = {
    "Qwen/Qwen2-VL-7B-Instruct": "qwen2_vl",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl",
    "Qwen/Qwen3.5-27B": "qwen3_5",
    "OpenGVLab/InternVL3-8B-hf": "internvl",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": "llava_onevision",
}
SNIPPETS = {
    re.search(r'name = "(.+)"', code)[1]: code
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    if "AutoModelForImageTextToText" in code
}


def test_every_family_has_a_snippet():
    assert set(SNIPPETS) == set(CHECKPOINTS)
    alike = {"llava", "llava_next", "qwen3_vl_moe", "qwen3_5_moe"}  # LLaVA has the page's first snippet
    assert set(CHECKPOINTS.values()) | alike == set(FAMILIES)
    assert all(f"`{CASES[name].stem}`" in PAGE for name in CASES)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_snippets_run(monkeypatch, capsys, checkpoint):
    case = CASES[CHECKPOINTS[checkpoint]]
    model = case.model()

    for name, made in (("AutoModelForImageTextToText", model), ("AutoProcessor", TinyProcessor(case))):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda *_, made=made, **__: made)
    room = {}
    code = SNIPPETS[checkpoint].replace("overall_tokens=256", "overall_tokens=3").replace("=64", "=4")
    exec(compile(code, checkpoint, "exec"), room)
    assert len(capsys.readouterr().out.split()) == 4, "the new tokens alone"
    assert [len(kept.indices) for kept in room["compression"].last_selection] == [3]
