"""Captions of a scene: what is where, in a fixed order, and how many of each category. 43 to 79 tokens.

A caption is one sentence per object, in the order of `in_order`, and a last sentence with the tally:

    In the top left there is a red circle. In the bottom right there is an orange digit 7. (...)
    There are 3: shape 1, digit 1, letter 1.

All words are words of the demo's tokenizer (vocabulary.py), so a checkpoint that learns captions needs no new one. The
tokenizer has no words for sizes.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from llava.shapes.vocabulary import CATEGORIES, COLOR_NAMES, KINDS, QUADRANTS, article, category_of

PROMPT = "What is there in the picture?"
MAX_TOKENS = 79  # of a caption: six digits or letters; without the token that ends an answer


class Fact(NamedTuple):
    """What a caption says about one object."""

    quadrant: str
    color: str
    kind: str


def in_order(scene) -> list[Fact]:
    """Facts of all objects: quadrant by quadrant as in QUADRANTS, inside a quadrant row by row of the scene's cells."""

    (columns, rows), (width, height) = scene.cells, scene.size

    def place(placed):
        x, y = placed.center
        return QUADRANTS.index(scene.quadrant(placed)), int(y * rows / height), int(x * columns / width)

    return [Fact(scene.quadrant(placed), placed.color, placed.kind) for placed in sorted(scene.objects, key=place)]


def caption(scene) -> str:
    """The reference caption of a scene."""
    facts = in_order(scene)
    found = Counter(category_of(fact.kind) for fact in facts)
    tally = ", ".join(f"{category} {found[category]}" for category in CATEGORIES)
    return " ".join([*map(_sentence, facts), f"There are {len(facts)}: {tally}."])


def _sentence(fact: Fact) -> str:
    category = category_of(fact.kind)
    name = fact.kind if category == "shape" else f"{category} {fact.kind}"
    return f"In the {fact.quadrant} there is {article(fact.color)} {fact.color} {name}."


_OBJECT = re.compile(
    rf"in the ({'|'.join(QUADRANTS)}) there is an? ({'|'.join(COLOR_NAMES)}) (?:(?:digit|letter) )?({'|'.join(KINDS)}) ?\."
)
_TALLY = re.compile(r"there are (\d) ?: ?" + r" ?, ?".join(rf"{category} (\d)" for category in CATEGORIES))


def read_facts(text: str) -> list[Fact]:
    """Facts of a caption, in its order, with repetitions. Sentences of another form state no fact."""
    return [Fact(*found) for found in _OBJECT.findall(_plain(text))]


def read_tally(text: str) -> tuple[int, ...] | None:
    """Numbers of the tally: all objects, shapes, digits, letters. None if the caption has none."""
    found = _TALLY.search(_plain(text))
    return tuple(map(int, found.groups())) if found else None


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
