"""Questions about a scene, each with a one-word answer."""

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
    article,
    category_of,
)


@dataclass(frozen=True)
class Question:
    """A question. text: as a user would type it. answer: one word. category: of QUESTION_TYPES or PRACTICE_TYPES."""

    text: str
    answer: str
    category: str


def ask(scene, category, rng):
    """A random question of this category about the scene, or None if the scene allows none."""
    return _MAKERS[category](scene, rng)


def ask_some(scene, rng, number, weights=None):
    """`number` questions whose categories are drawn by `weights`. An impossible category is replaced by `exists`.

    weights: numbers in the order of QUESTION_TYPES, then PRACTICE_TYPES, which may be missing. None: four equal ones.
    """
    weights = [1.0] * len(QUESTION_TYPES) if weights is None else list(weights)
    categories = (*QUESTION_TYPES, *PRACTICE_TYPES)
    total = sum(weights)
    drawn = rng.choice(len(weights), size=number, p=[weight / total for weight in weights])
    return [ask(scene, categories[c], rng) or ask(scene, "exists", rng) for c in drawn]


def _color(scene, rng):
    """Question for the colour of a kind that occurs once."""
    counts = Counter(placed.kind for placed in scene.objects)
    unique = [placed for placed in scene.objects if counts[placed.kind] == 1]
    if not unique:
        return None
    placed = unique[rng.integers(len(unique))]
    return Question(f"What color is the {placed.kind}?", placed.color, "color")


def _exists(scene, rng):
    """Question whether an object of a colour and kind exists: half yes, half no.

    For every no, an object of the scene has the kind or the colour that is asked for. Otherwise a model could answer
    from the kinds alone.
    """
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
            # The hardest case: the kind and the colour both occur, but on different objects.
            other = scene.objects[rng.integers(len(scene.objects))]
            kind = other.kind
            if (color, kind) in pairs:
                color = COLOR_NAMES[rng.integers(len(COLOR_NAMES))]
    return Question(f"Is there {article(color)} {color} {kind}?", answer, "exists")


def _where(scene, rng):
    """Question for the digit, letter or shape in a quadrant that has exactly one object of that category."""
    found = Counter((category_of(placed.kind), scene.quadrant(placed)) for placed in scene.objects)
    single = [(c, q) for c in CATEGORIES for q in QUADRANTS if found[c, q] == 1]
    if not single:
        return None
    category, quadrant = single[rng.integers(len(single))]
    answer = next(p.kind for p in scene.objects if category_of(p.kind) == category and scene.quadrant(p) == quadrant)
    return Question(f"What {category} is in the {quadrant}?", answer, "where")


def _count(scene, rng):
    """Question for the number of objects of a shape. In one question of five, the scene does not have the shape."""
    counts = Counter(placed.kind for placed in scene.objects if placed.kind in SHAPES)
    absent = [shape for shape in SHAPES if shape not in counts]
    pool = absent if absent and (not counts or rng.random() < 0.2) else list(counts)
    shape = pool[rng.integers(len(pool))]
    return Question(f"How many {PLURALS[shape]} are there?", str(counts[shape]), "count")


def _named(scene, rng):
    """Question for the shape, digit or letter that has a colour, if only one does."""
    found = Counter((category_of(placed.kind), placed.color) for placed in scene.objects)
    single = [p for p in scene.objects if found[category_of(p.kind), p.color] == 1]
    if not single:
        return None
    placed = single[rng.integers(len(single))]
    return Question(f"What {category_of(placed.kind)} is {placed.color}?", placed.kind, "named")


def _some(scene, rng):
    """Question whether any shape, digit or letter has a colour. About half are yes, and the category always occurs."""
    placed = scene.objects[rng.integers(len(scene.objects))]
    category, color = category_of(placed.kind), placed.color
    if rng.random() < 0.5:
        color = COLOR_NAMES[rng.integers(len(COLOR_NAMES))]
        if rng.random() < 0.5:
            color = scene.objects[rng.integers(len(scene.objects))].color
    answer = "yes" if any((category_of(p.kind), p.color) == (category, color) for p in scene.objects) else "no"
    return Question(f"Is there {article(color)} {color} {category}?", answer, "some")


def _tally(scene, rng):
    """Question for the number of objects of a colour. In one question of four, the scene does not have the colour."""
    counts = Counter(placed.color for placed in scene.objects)
    absent = [color for color in COLOR_NAMES if color not in counts]
    pool = absent if absent and rng.random() < 0.25 else list(counts)
    color = pool[rng.integers(len(pool))]
    return Question(f"How many {color} are there?", str(counts[color]), "tally")


def _pairs(scene, rng):
    """Question for the number of objects with a colour and a kind. Half of the questions replace one of the two."""
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
