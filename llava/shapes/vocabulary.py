"""The closed world of the demo: kinds of objects, colours, places, and every word the demo model knows."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DIGITS = tuple("0123456789")
# No "a": a word-level tokenizer would mix it up with the article; no "s", which stands in "user's". The others are left
# out because they look like another kind (B and 8, O and a ring, X and a cross).
LETTERS = tuple("ehkmptuw")
KINDS = SHAPES + DIGITS + LETTERS
CATEGORIES = ("shape", "digit", "letter")

COLORS = {
    "red": (225, 45, 45),
    "green": (45, 185, 60),
    "blue": (60, 95, 240),
    "yellow": (240, 225, 50),
    "orange": (245, 135, 25),
    "purple": (165, 65, 215),
    "cyan": (60, 215, 225),
    "white": (245, 245, 245),
}
COLOR_NAMES = tuple(COLORS)
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "ring": "rings",
}
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
QUESTION_TYPES = ("color", "exists", "where", "count")
# Asked in training alone: they make the LLM look objects up by colour, which no other type but "exists" needs.
PRACTICE_TYPES = ("named", "some", "tally", "pairs")
MAX_OBJECTS = 6

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SHORT_ANSWER = "Answer the question using a single word or phrase."


def category_of(kind):
    """'shape', 'digit' or 'letter'."""
    return "shape" if kind in SHAPES else "digit" if kind in DIGITS else "letter"


def naming_words():
    """The words that name something visible: kinds, colours, categories and plurals, in a fixed order."""
    return (*KINDS, *COLOR_NAMES, *CATEGORIES, *PLURALS.values())


def all_words():
    """Every word of the tokenizer, in a fixed order, without duplicates."""
    template = f"{SYSTEM} USER: ASSISTANT: {SHORT_ANSWER} what color is the in top bottom left right are there how many yes no picture ?"
    for mark in ".,:'?":
        template = template.replace(mark, f" {mark} ")
    words = ["\n", *naming_words(), *template.lower().split()]
    return tuple(dict.fromkeys(words))
