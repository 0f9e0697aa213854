"""`adav_transformers` of lmms-eval on tiny random models, with a processor that makes the prompts of the family.

Whole runs of lmms-eval are in test_lmms_eval.py. `make lmms-eval` installs what this needs.
"""

import re

import pytest
from family_cases import CASES
from family_processor import PICTURES, TinyProcessor
from PIL import Image

from llava.config import AdaVConfig
from llava.integrations.transformers import compress

pytest.importorskip("lmms_eval", reason="make lmms-eval installs it")


@pytest.fixture(params=["qwen3_vl", "internvl", "llava_onevision"])
def case(request):
    return CASES[request.param]


def loaded(monkeypatch, case, **arguments):
    from llava.integrations.lmms_eval import transformers_model

    model, processor = case.model(), TinyProcessor(case)
    for name, made in (("AutoModelForImageTextToText", model), ("AutoProcessor", processor)):
        monkeypatch.setattr(getattr(transformers_model, name), "from_pretrained", lambda *_, made=made, **__: made)
    return transformers_model.AdaVTransformers("tiny", **arguments), model, processor


def requests(model, documents, settings):
    from lmms_eval.api.instance import Instance

    model.task_dict = {"shapes": {"test": documents}}
    return [
        Instance(
            "generate_until",
            (text, settings, lambda document: document[1], i, "shapes", "test"),
            i,
            {"task": "shapes", "doc_id": i, "repeats": 1},
        )
        for i, (text, _) in enumerate(documents)
    ]


DOCUMENTS = [
    ("What is it?", [Image.new("RGB", PICTURES["large"])]),
    ("Compare <image> with <image> please", [Image.new("RGB", PICTURES[name]) for name in ("small", "tall")]),
    ("No picture at all", []),
    ("Odd", ["video.mp4"]),
]


@pytest.mark.parametrize("method", ["adav", "fastv"])
def test_answers_are_those_of_compress(monkeypatch, capsys, case, method):
    options = '{"layer": 1}' if method == "fastv" else "{}"
    keys = {"method": method, "overall_tokens": 3, "options": options}
    model, stock, processor = loaded(monkeypatch, case, batch_size=4, system_prompt="Be brief", **keys)
    found = model.generate_until(requests(model, DOCUMENTS, {"max_new_tokens": 4, "temperature": 0}))
    config = AdaVConfig(method=method, overall_tokens=3, options={"layer": 1} if method == "fastv" else {})
    texts = ["Be brief|<image>|What is it?", "Be brief|Compare |<image>| with |<image>| please"]
    texts.append("Be brief|No picture at all")
    for (text, (_, pictures)), answer in zip(zip(texts, DOCUMENTS, strict=False), found, strict=False):
        inputs = processor([text], [pictures] if pictures else None, True, "pt")
        with compress(stock, config):
            output = stock.generate(**inputs, max_new_tokens=4, do_sample=False)
        length = inputs["input_ids"].shape[1]
        assert answer.text == " ".join(map(str, output[0, length:].tolist()))
        dropped = int((inputs["input_ids"] == 90).sum()) - 3 * len(pictures)
        assert answer.token_counts.input_tokens == length - dropped and answer.token_counts.output_tokens == 4
    assert found[3].text == ""
    told = capsys.readouterr().err
    assert "document 3: it shows str, allowed are images; its answer is empty" in told
    assert "-> 3.0 (mean of 3 images)" in told


def test_bad_input_ends_before_the_first_question(monkeypatch, capsys, case):
    for arguments, message in (
        ({"method": "visionzip"}, "which .* does not have"),
        ({"overal_tokens": 3}, 'unknown key "overal_tokens"'),
        ({"batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(SystemExit) as end:
            loaded(monkeypatch, case, **arguments)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert re.search(message, error)
