"""Captions of the demo's scenes: order, words, length, and what is read back from them."""

import numpy as np
import pytest

from llava.shapes.captions import MAX_TOKENS, PROMPT, Fact, caption, in_order, read_facts, read_tally
from llava.shapes.dataset import scene_caption, write_dataset
from llava.shapes.scenes import FAMILIES, Placed, Scene, draw_scene
from llava.shapes.tokenizer import build_tokenizer
from llava.shapes.vocabulary import CATEGORIES, category_of

# Cells of 24 pixels. In the top left: two objects of one row of cells, the right one a little higher; below them another.
OBJECTS = [
    Placed("7", "orange", 76, 75, 20),
    Placed("ring", "red", 26, 1, 20),
    Placed("ring", "red", 2, 3, 20),
    Placed("k", "blue", 1, 28, 18),
    Placed("circle", "white", 50, 2, 16),
]
CAPTION = (
    "In the top left there is a red ring. In the top left there is a red ring. In the top left there is a blue letter k. "
    "In the top right there is a white circle. In the bottom right there is an orange digit 7. "
    "There are 5: shape 3, digit 1, letter 1."
)


def test_a_caption_by_hand():
    scene = Scene(np.zeros((96, 96, 3), np.uint8), np.zeros((96, 96), np.int8), OBJECTS)
    assert caption(scene) == CAPTION
    assert (
        in_order(scene)
        == read_facts(CAPTION)
        == [
            Fact("top left", "red", "ring"),
            Fact("top left", "red", "ring"),
            Fact("top left", "blue", "k"),
            Fact("top right", "white", "circle"),
            Fact("bottom right", "orange", "7"),
        ]
    )
    assert read_tally(CAPTION) == (5, 3, 1, 1)


@pytest.mark.parametrize(
    "text, facts",
    [
        ("in the top left there is a red ring .", [Fact("top left", "red", "ring")]),
        ("In the top left there is a red ring", []),  # cut off in front of the full stop
        (
            "In the top there is a red ring. In the top right there is an orange letter k.",
            [Fact("top right", "orange", "k")],
        ),
        ("In the top left there is a red red.", []),
        ("", []),
    ],
)
def test_what_a_caption_states(text, facts):
    assert read_facts(text) == facts and read_tally(text) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_of_all_scenes_have_40_to_80_known_tokens(family):
    """Each is read back as the scene's objects, also after the tokenizer's decoder has put spaces around marks."""
    tokenizer, lengths = build_tokenizer(), set()
    for index in range(300):
        scene = draw_scene(family, "test", index)
        ids = tokenizer.encode(caption(scene), add_special_tokens=False).ids
        assert tokenizer.token_to_id("<unk>") not in ids
        lengths.add(len(ids))
        said = tokenizer.decode(ids)
        assert read_facts(said) == in_order(scene)
        assert sorted(read_facts(said)) == sorted(Fact(scene.quadrant(o), o.color, o.kind) for o in scene.objects)
        counts = [sum(category_of(o.kind) == category for o in scene.objects) for category in CATEGORIES]
        assert read_tally(said) == (len(scene.objects), *counts)
    assert 40 <= min(lengths) < max(lengths) <= MAX_TOKENS <= 80


def test_the_longest_caption_has_max_tokens():
    tokenizer = build_tokenizer()
    six = [Placed("k", "red", 24 * n % 96, 24 * (n // 4), 20) for n in range(6)]
    scene = Scene(np.zeros((96, 96, 3), np.uint8), np.zeros((96, 96), np.int8), six)
    assert len(tokenizer.encode(caption(scene), add_special_tokens=False).ids) == MAX_TOKENS


def test_a_data_set_of_captions(tmp_path):
    """The same arguments give the same files. Each picture has one question, and it is the picture of the other data set."""
    first, again = (write_dataset("v1.5", "test", 3, tmp_path / name, captions=True) for name in "ab")
    for name in ("questions.jsonl", "labels.jsonl", "images/000003.png"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    others = write_dataset("v1.5", "test", 12, tmp_path / "c")
    assert (first / "images/000003.png").read_bytes() == (others / "images/000003.png").read_bytes()
    assert len(list((first / "images").iterdir())) == 3
    _, (question,) = scene_caption("v1.5", "test", 2)
    assert question.text == PROMPT and question.answer in (first / "labels.jsonl").read_text().splitlines()[2]
    # A folder with questions about the same pictures is no data set of captions.
    assert "caption" not in (others / "labels.jsonl").read_text()
    assert "caption" in (write_dataset("v1.5", "test", 12, tmp_path / "c", captions=True) / "labels.jsonl").read_text()
