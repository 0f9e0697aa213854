"""Which questions are asked, and by which shard."""

import random
from itertools import groupby

import pytest

from llava.eval.benchmarks.questions import Sample
from llava.eval.benchmarks.subset import Subset
from llava.eval.runs.division import by_image, divide, useful_shards


def sample(line, image, question_id=None):
    name = line if question_id is None else question_id
    return Sample(line, name, image, "x", "x", (name, image, "x"), {})


def made(images):
    return [sample(line, image) for line, image in enumerate(images, 1)]


def test_work_is_ordered_by_image_in_the_order_of_first_lines():
    samples = made(["b", "a", None, "b", "c", "a", None])
    assert [one.line for one in by_image(samples)] == [1, 4, 2, 6, 3, 5, 7]


@pytest.mark.parametrize("seed", range(40))
def test_shards_share_no_image_and_lose_nothing(seed):
    chance = random.Random(seed)
    images = [chance.choice([None, *"abcdefgh"]) for _ in range(chance.randint(0, 30))]
    samples = by_image(made(images))
    groups = [list(group) for _, group in groupby(samples, key=lambda one: one.image or one.key)]
    for parts in range(1, 12):
        pieces = divide(samples, parts)
        assert len(pieces) == parts and sum(pieces, []) == samples
        asked = [one.image for piece in pieces for one in {s.image: s for s in piece}.values() if one.image]
        assert len(asked) == len(set(asked)), "an image is asked about in two shards"
        assert sum(map(bool, pieces)) == min(parts, len(groups)) or not samples
        largest = max(map(len, groups), default=0)
        if len(groups) >= parts and largest * parts <= len(samples):
            assert max(map(len, pieces)) <= len(samples) / parts + largest
        assert useful_shards([samples], parts) == max(1, min(parts, len(groups)))


def test_even_images_are_divided_evenly():
    samples = by_image(made([f"image {n // 6}" for n in range(120)]))
    assert [len(piece) for piece in divide(samples, 4)] == [30, 30, 30, 30]
    assert [len(piece) for piece in divide(samples, 3)] == [42, 36, 42]


def test_a_subset_depends_on_its_questions_and_seed_alone():
    samples = made([f"{n % 7}" for n in range(60)])
    chosen = Subset(20).draw(samples, lambda one: one.key)
    assert len(chosen) == 20 and [one.line for one in chosen] == sorted(one.line for one in chosen)
    shuffled = random.Random(0).sample(samples, len(samples))
    assert {one.key for one in Subset(20).draw(shuffled, lambda one: one.key)} == {one.key for one in chosen}
    larger = {one.key for one in Subset(30).draw(samples, lambda one: one.key)}
    assert {one.key for one in chosen} < larger
    assert Subset(20, seed=1).draw(samples, lambda one: one.key) != chosen
    assert Subset(99).draw(samples, lambda one: one.key) == samples
    assert Subset(20, 3).label(20, 6000) == "20 of 6,000 questions, drawn with seed 3"


def test_a_subset_takes_whole_groups():
    samples = made([f"{n // 3}" for n in range(60)])
    chosen = Subset(10).draw(samples, lambda one: one.image)
    assert len(chosen) == 12, "at least as many as were asked for"
    assert all(sum(other.image == one.image for other in chosen) == 3 for one in chosen)
