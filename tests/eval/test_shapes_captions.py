"""The benchmark of long answers: scores worked out by hand, and its data."""

from dataclasses import astuple

import pytest

from llava.common.find_checkpoint import find_checkpoint
from llava.config import AdaVConfig
from llava.eval.benchmarks.shapes_captions import ShapesCaptions, judge
from llava.eval.runs.image_reader import read_image
from llava.eval.scoring.verdicts import headline
from llava.inference.loaded_checkpoint import LoadedCheckpoint
from llava.model.decoding.sampling import Sampling

RED, BLUE = "In the top left there is a red ring.", "In the top right there is a blue letter k."
TALLY = "There are 3: shape 2, digit 0, letter 1."
REFERENCE = f"{RED} {RED} {BLUE} {TALLY}"


@pytest.mark.parametrize(
    "answer, stated, right, exact, tally",
    [
        (REFERENCE, 3, 3, True, True),
        (REFERENCE.lower().replace(".", " .").replace(":", " :"), 3, 3, True, True),
        (f"{BLUE} {RED} {RED} {TALLY}", 3, 3, False, True),  # another order
        (f"{RED} {BLUE} {TALLY}", 2, 2, False, True),  # one of two equal objects
        (f"{RED} {RED} {RED} {BLUE} {TALLY}", 4, 3, False, True),  # one too many
        (f"{RED} {RED} {BLUE.replace('blue', 'red')} There are 3: shape 3, digit 0, letter 0.", 3, 2, False, False),
        (BLUE.replace("right", "left"), 1, 0, False, False),
        ("a red ring", 0, 0, False, False),
    ],
)
def test_a_caption_is_judged(answer, stated, right, exact, tally):
    judged = judge(answer, REFERENCE)
    assert astuple(judged) == (stated, 3, right, exact, tally)
    assert judged.precision == (right / stated if stated else 0)
    assert judged.recall == right / 3
    assert judged.f1 == pytest.approx(2 * right / (stated + 3))


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShapesCaptions, "questions", 20)
        made = ShapesCaptions(tmp_path_factory.mktemp("data"), None)
        made.make_data()
        yield made


def test_the_score_of_a_run(benchmark, tmp_path):
    samples = benchmark.load()
    references = [benchmark.labels()[sample.question_id]["answer"] for sample in samples]
    right = benchmark.finish(samples, [{"text": text} for text in references], tmp_path)
    assert right == {
        **dict.fromkeys(("f1", "precision", "recall", "exact", "tally"), 1.0),
        "questions": 20,
        "per_category": dict.fromkeys(right["per_category"], 1.0),
    }
    assert set(right["per_category"]) <= {f"{n} objects" for n in (3, 4, 5, 6)}
    # Without its first sentence a caption of n objects has n - 1 right ones: its F1 is 2 (n - 1) / (2 n - 1).
    rows = [{"text": text.split(". ", 1)[1]} for text in references]
    score, verdicts = benchmark.finish(samples, rows, tmp_path), benchmark.verdicts(samples, rows, tmp_path)
    objects = [text.count("there is") for text in references]
    assert score["f1"] == pytest.approx(sum(2 * (n - 1) / (2 * n - 1) for n in objects) / 20)
    assert score["precision"] == 1 and score["exact"] == 0 and score["tally"] == 1
    assert headline(verdicts) == pytest.approx(score["f1"])
    assert [verdict.kinds for verdict in verdicts] == [(f"{n} objects",) for n in objects]


def test_the_shipped_checkpoint_writes_captions(benchmark, tmp_path):
    """All tokens on 20 pictures, in one batch: right objects, captions that end, and a cache policy that changes them."""
    samples = benchmark.load()
    images = [read_image(benchmark.image_folder / sample.image) for sample in samples]
    loaded = LoadedCheckpoint(find_checkpoint("playground/llava-shapes-captions").folder, device="cpu")

    def f1(**keys):
        config = AdaVConfig(method="none", **keys)
        prepared = loaded.prepare([sample.prompt for sample in samples], images, config)
        answers = loaded.engine.generate(prepared, Sampling(benchmark.max_new_tokens)).answers
        return benchmark.score(samples, [{"text": answer.text} for answer in answers], tmp_path)["f1"]

    whole = f1()
    assert whole >= 0.7
    assert whole - f1(h2o_heavy_share=0.05, h2o_recent_share=0.05) >= 0.2
