"""benchmarks/long_answers.py: its settings are configurations, and its rows are right on answers worked out by hand."""

import json
from types import SimpleNamespace

import long_answers
import pytest

from llava.config import AdaVConfig
from llava.eval.benchmarks.shapes_captions import judge

SENTENCES = ("In the top left there is a red ring.", "In the top right there is a blue star.")
REFERENCE = " ".join((*SENTENCES, "There are 2: shape 2, digit 0, letter 0."))
# Of two pictures: the first setting has both right, the second one has one object of the first picture.
ANSWERS = {"whole": [REFERENCE, REFERENCE], "pruned": [SENTENCES[0], REFERENCE]}
BYTES = {"whole": (1000, 800), "pruned": (500, 200)}


def test_settings_are_different_configurations():
    found = {AdaVConfig(**{"method": "none"} | keys).digest for keys in long_answers.SETTINGS.values()}
    assert len(found) == len(long_answers.SETTINGS) and long_answers.SETTINGS[long_answers.FULL] == {}


def test_rows_by_hand(tmp_path):
    benchmark = SimpleNamespace(judged=lambda samples, rows: [judge(row["text"], REFERENCE) for row in rows])
    runs, reports = {}, {}
    for name, texts in ANSWERS.items():
        merged = tmp_path / f"{name}.jsonl"
        merged.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        samples = [SimpleNamespace(image=f"{number}.png") for number in range(2)]
        runs[name] = SimpleNamespace(merged=merged, samples=samples, benchmark=benchmark, config=AdaVConfig())
        kept, read = BYTES[name]
        reports[name] = {
            "kv_bytes_live": {"mean": kept},
            "kv_bytes_read": {"mean": read},
            "new_tokens": {"mean": 30.0},
            "vision_tokens_per_image": {"after": 144.0},
        }
    whole, pruned = long_answers.rows_of(runs, reports)
    assert (whole["f1"], whole["exact"], whole["tally"], whole["changed"]) == (1, 1, 1, 0)
    assert (whole["f1_difference"], whole["kept"], whole["read"]) == (0, 1, 1)
    # One of two objects: precision 1, recall 1/2, F1 2/3.
    assert pruned["f1"] == pytest.approx((2 / 3 + 1) / 2, abs=1e-4)
    assert (pruned["precision"], pruned["recall"]) == (1, 0.75)
    assert (pruned["exact"], pruned["tally"], pruned["changed"]) == (0.5, 0.5, 0.5)
    assert pruned["f1_difference"] == pytest.approx(-1 / 6, abs=1e-4)
    assert (pruned["f1_difference_low"], pruned["f1_difference_high"]) == (pytest.approx(-1 / 3, abs=1e-4), 0)
    assert (pruned["kept"], pruned["read"]) == (0.5, 0.25)
    assert "83.3 [66.7, 100.0] | -16.7 [-33.3, +0.0] |" in long_answers.table([whole, pruned])
