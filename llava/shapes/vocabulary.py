"""The vocabulary of the demo: kinds of objects, colours, places, and all words that the demo model knows."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DIGITS = tuple("0123456789")
# "a" is missing because a word-level tokenizer would confuse it with the article, and "s" because "user's" has it. The
# other missing letters look like another kind (B and 8, O and a ring, X and a cross).
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
# Only training asks these. They make the LLM look objects up by colour, which of the four types only "exists" needs.
PRACTICE_TYPES = ("named", "some", "tally", "pairs")
MAX_OBJECTS = 6

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SHORT_ANSWER = "Answer the question using a single word or phrase."


def category_of(kind):
    """Category of a kind: 'shape', 'digit' or 'letter'."""
    return "shape" if kind in SHAPES else "digit" if kind in DIGITS else "letter"


def article(word):
    """Indefinite article of a word."""
    return "an" if word[0] in "aeiou" else "a"


def naming_words():
    """Words that name something visible: kinds, colours, categories and plurals, in a fixed order."""
    return (*KINDS, *COLOR_NAMES, *CATEGORIES, *PLURALS.values())


def all_words():
    """All words of the tokenizer, in a fixed order, without duplicates."""
    # All prompts of training and evaluation are made of these words. A missing one would be read as <unk>.
    template = f"{SYSTEM} USER: ASSISTANT: {SHORT_ANSWER} what color is the in top bottom left right are there how many yes no picture ?"
    for mark in ".,:'?":
        template = template.replace(mark, f" {mark} ")
    words = ["\n", *naming_words(), *template.lower().split()]
    return tuple(dict.fromkeys(words))
