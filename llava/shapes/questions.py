"""Questions about a scene, each with its one-word answer."""

from collections import Counter
from dataclasses import dataclass

from llava.shapes.vocabulary import (
    CATEGORIES,
    COLOR_NAMES,
    KINDS,
    PLURALS,
    PRACTICE_TYPES,
    QUADRANTS,
    QUESTION_TYPES,
    SHAPES,
    category_of,
)


@dataclass(frozen=True)
class Question:
    """`text` as a user would type it, `answer` one word, `category` one of QUESTION_TYPES or PRACTICE_TYPES."""

    text: str
    answer: str
    category: str


def ask(scene, category, rng):
    """A random question of this category about the scene, or None where the scene allows none."""
    return _MAKERS[category](scene, rng)


def ask_some(scene, rng, number, weights=None):
    """`number` questions (an impossible category is replaced by an existence question), categories drawn by `weights`.

    `weights`: positive numbers in the order of QUESTION_TYPES and, where there are more, PRACTICE_TYPES; four equal
    ones when missing.
    """
    weights = [1.0] * len(QUESTION_TYPES) if weights is None else list(weights)
    categories = (*QUESTION_TYPES, *PRACTICE_TYPES)
    total = sum(weights)
    drawn = rng.choice(len(weights), size=number, p=[weight / total for weight in weights])
    return [ask(scene, categories[c], rng) or ask(scene, "exists", rng) for c in drawn]


def _color(scene, rng):
    """The colour of a kind that occurs once."""
    counts = Counter(placed.kind for placed in scene.objects)
    unique = [placed for placed in scene.objects if counts[placed.kind] == 1]
    if not unique:
        return None
    placed = unique[rng.integers(len(unique))]
    return Question(f"What color is the {placed.kind}?", placed.color, "color")


def _exists(scene, rng):
    """Half yes, half no; every no shares its kind or its colour with an object of the scene."""
    pairs = {(placed.color, placed.kind) for placed in scene.objects}
    placed = scene.objects[rng.integers(len(scene.objects))]
    color, kind = placed.color, placed.kind
    answer = "yes" if rng.random() < 0.5 else "no"
    while answer == "no" and (color, kind) in pairs:
        color, kind = placed.color, placed.kind
        draw = rng.random()
        if draw < 0.5:
            color = COLOR_NAMES[rng.integers(len(COLOR_NAMES))]
        elif draw < 0.75:
            kind = KINDS[rng.integers(len(KINDS))]
        else:
            # The hardest: both the kind and the colour are there, on different objects.
            other = scene.objects[rng.integers(len(scene.objects))]
            kind = other.kind
            if (color, kind) in pairs:
                color = COLOR_NAMES[rng.integers(len(COLOR_NAMES))]
    return Question(f"Is there {_article(color)} {color} {kind}?", answer, "exists")


def _article(word):
    return "an" if word[0] in "aeiou" else "a"


def _where(scene, rng):
    """What digit, letter or shape is in a quadrant that holds exactly one of that category."""
    found = Counter((category_of(placed.kind), scene.quadrant(placed)) for placed in scene.objects)
    single = [(c, q) for c in CATEGORIES for q in QUADRANTS if found[c, q] == 1]
    if not single:
        return None
    category, quadrant = single[rng.integers(len(single))]
    answer = next(p.kind for p in scene.objects if category_of(p.kind) == category and scene.quadrant(p) == quadrant)
    return Question(f"What {category} is in the {quadrant}?", answer, "where")


def _count(scene, rng):
    """How many of a shape; one question in five asks for a shape that is not there."""
    counts = Counter(placed.kind for placed in scene.objects if placed.kind in SHAPES)
    absent = [shape for shape in SHAPES if shape not in counts]
    pool = absent if absent and (not counts or rng.random() < 0.2) else list(counts)
    shape = pool[rng.integers(len(pool))]
    return Question(f"How many {PLURALS[shape]} are there?", str(counts[shape]), "count")


def _named(scene, rng):
    """What shape, digit or letter has this colour, where only one does."""
    found = Counter((category_of(placed.kind), placed.color) for placed in scene.objects)
    single = [p for p in scene.objects if found[category_of(p.kind), p.color] == 1]
    if not single:
        return None
    placed = single[rng.integers(len(single))]
    return Question(f"What {category_of(placed.kind)} is {placed.color}?", placed.kind, "named")


def _some(scene, rng):
    """Whether any shape, digit or letter has this colour; about half yes, and the category is always there."""
    placed = scene.objects[rng.integers(len(scene.objects))]
    category, color = category_of(placed.kind), placed.color
    if rng.random() < 0.5:
        color = COLOR_NAMES[rng.integers(len(COLOR_NAMES))]
        if rng.random() < 0.5:
            color = scene.objects[rng.integers(len(scene.objects))].color
    answer = "yes" if any((category_of(p.kind), p.color) == (category, color) for p in scene.objects) else "no"
    return Question(f"Is there {_article(color)} {color} {category}?", answer, "some")


def _tally(scene, rng):
    """How many objects have a colour; one question in four asks for a colour that is not there."""
    counts = Counter(placed.color for placed in scene.objects)
    absent = [color for color in COLOR_NAMES if color not in counts]
    pool = absent if absent and rng.random() < 0.25 else list(counts)
    color = pool[rng.integers(len(pool))]
    return Question(f"How many {color} are there?", str(counts[color]), "tally")


def _pairs(scene, rng):
    """How many objects have a colour and a kind; half of the questions change one of the two."""
    placed = scene.objects[rng.integers(len(scene.objects))]
    color, kind = placed.color, placed.kind
    draw = rng.random()
    if draw < 0.25:
        color = COLOR_NAMES[rng.integers(len(COLOR_NAMES))]
    elif draw < 0.5:
        kind = KINDS[rng.integers(len(KINDS))]
    number = sum((p.color, p.kind) == (color, kind) for p in scene.objects)
    return Question(f"How many {color} {PLURALS.get(kind, kind)} are there?", str(number), "pairs")


_MAKERS = {
    "color": _color,
    "exists": _exists,
    "where": _where,
    "count": _count,
    "named": _named,
    "some": _some,
    "tally": _tally,
    "pairs": _pairs,
}
