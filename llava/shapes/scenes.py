"""Draws the pictures of the demo task. (family, split, set, index) determines every pixel.

Family `v1.5`: 96x96 pixels, 4x4 cells, 3 to 6 objects. Family `v1.6`: five aspect ratios, up to 192x192 pixels (strips
up to 288x96), with the same number of smaller objects. The whole picture at 96x96 is then too coarse, so the crops
matter.
"""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from llava.shapes.glyphs import glyph_mask
from llava.shapes.vocabulary import COLOR_NAMES, COLORS, DIGITS, LETTERS, MAX_OBJECTS, SHAPES, category_of

FAMILIES = ("v1.5", "v1.6")
SPLITS = ("train", "validation", "test")
# (width, height) of the five canvases of v1.6, one per anyres grid, before each side shrinks by up to 14 %.
CANVASES = ((96, 192), (192, 96), (192, 192), (288, 96), (96, 288))
_CELL = 24  # pixels per side of a cell, about


@dataclass(frozen=True)
class Placed:
    """One object: its kind, its colour, and the pixel box (left, top, size) that it is drawn into."""

    kind: str
    color: str
    left: int
    top: int
    size: int

    @property
    def center(self):
        return self.left + self.size / 2, self.top + self.size / 2


@dataclass
class Scene:
    """A picture and its objects.

    pixels: uint8 [height, width, 3]. owner: int8 [height, width], index of the object that covers the pixel, or -1.
    """

    pixels: np.ndarray
    owner: np.ndarray
    objects: list = field(default_factory=list)

    @property
    def size(self):
        """(width, height) in pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]

    @property
    def cells(self):
        """(columns, rows) of the grid. A cell has at most one object."""
        return _cells(*self.size)

    def quadrant(self, placed):
        """Name of the quadrant of the picture that has the object's centre, for example 'top left'."""
        x, y = placed.center
        return f"{'top' if y < self.size[1] / 2 else 'bottom'} {'left' if x < self.size[0] / 2 else 'right'}"


def scene_rng(family, split, index, seed_set=0, stream=0):
    """Random generator of one scene (`stream` 0) or of its questions (`stream` 1). No two keys share a seed."""
    # A stream of its own: a change in the questions must not change the pictures.
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: expected one of {', '.join(FAMILIES)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    return np.random.default_rng([FAMILIES.index(family), SPLITS.index(split), seed_set, stream, index])


def scene_size(family, split, index, seed_set=0):
    """(width, height) of the scene with this key, without drawing it."""
    return _canvas_size(family, scene_rng(family, split, index, seed_set))


def draw_scene(family, split, index, seed_set=0):
    """The scene with this key. The same key always gives the same pixels."""
    rng = scene_rng(family, split, index, seed_set)
    width, height = _canvas_size(family, rng)
    pixels = _background(rng, width, height)
    owner = np.full((height, width), -1, dtype=np.int8)
    objects = _place_objects(family, rng, width, height)
    for number, placed in enumerate(objects):
        _paint(pixels, owner, placed, number, rng)
    # Noise on every pixel: otherwise background patches would be almost equal to each other.
    pixels += rng.normal(0.0, 7.0, pixels.shape).astype(np.float32)
    return Scene(np.clip(pixels, 0, 255).astype(np.uint8), owner, objects)


def _canvas_size(family, rng):
    if family == "v1.5":
        return 96, 96
    width, height = CANVASES[rng.integers(len(CANVASES))]
    # A picture with shrunk sides does not fill its tiles, so padding, unpadding and scaling all occur.
    return int(round(width * rng.uniform(0.86, 1.0))), int(round(height * rng.uniform(0.86, 1.0)))


def _background(rng, width, height):
    """Dark coloured texture with grey strokes, arcs and blobs, float32 [height, width, 3]."""
    # The clutter is grey, which is the colour of no object, so no question is about it.
    coarse = rng.uniform(-22, 22, (5, 5, 3)) + rng.uniform(25, 75, 3)
    texture = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(texture)
    clutter = max(1, round(width * height / (96 * 96)))
    for _ in range(int(rng.integers(2, 5)) * clutter):
        grey = (int(rng.integers(85, 150)),) * 3
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        shape = rng.integers(3)
        if shape == 0:
            angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(8, 26)
            draw.line(
                (x, y, x + length * np.cos(angle), y + length * np.sin(angle)), fill=grey, width=int(rng.integers(1, 3))
            )
        elif shape == 1:
            radius, start = rng.uniform(4, 11), rng.uniform(0, 360)
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.arc(box, start, start + rng.uniform(60, 200), fill=grey, width=int(rng.integers(1, 3)))
        else:
            a, b = rng.uniform(1.5, 4.5, 2)
            draw.ellipse((x - a, y - b, x + a, y + b), fill=grey)
    return np.asarray(texture, dtype=np.float32).copy()


def _cells(width, height):
    # An even number of cells per side, so that no object crosses the lines between the quadrants.
    return tuple(max(2, 2 * int(side / _CELL / 2)) for side in (width, height))


def _place_objects(family, rng, width, height):
    """3 to 6 objects in different cells. Half of the scenes repeat a shape, so that the count is not always one."""
    columns, rows = _cells(width, height)
    low, high = (16, 23) if family == "v1.5" else (14, 18)
    number = int(rng.integers(3, MAX_OBJECTS + 1))
    kinds = [_random_kind(rng) for _ in range(number)]
    if rng.random() < 0.5:
        repeated = SHAPES[rng.integers(len(SHAPES))]
        for slot in rng.choice(number, size=int(rng.integers(2, min(number, 4) + 1)), replace=False):
            kinds[slot] = repeated
    objects = []
    for kind, place in zip(kinds, rng.choice(columns * rows, size=number, replace=False), strict=True):
        size = int(rng.integers(low, high + 1))
        row, column = divmod(int(place), columns)
        left = _jitter(rng, column, width / columns, size)
        top = _jitter(rng, row, height / rows, size)
        objects.append(Placed(kind, COLOR_NAMES[rng.integers(len(COLOR_NAMES))], left, top, size))
    return objects


def _jitter(rng, cell, side, size):
    """Random first pixel of an object inside its cell. cell: its index; side: pixels per cell; size: of the object."""
    return int(np.floor(cell * side + rng.uniform(0, max(side - size, 0))))


def _random_kind(rng):
    group = (SHAPES, DIGITS, LETTERS)[rng.choice(3, p=(0.45, 0.3, 0.25))]
    return group[rng.integers(len(group))]


def _paint(pixels, owner, placed, number, rng):
    mask = glyph_mask(placed.kind, placed.size)
    rows, columns = slice(placed.top, placed.top + placed.size), slice(placed.left, placed.left + placed.size)
    color = np.asarray(COLORS[placed.color], dtype=np.float32) * rng.uniform(0.88, 1.0) + rng.uniform(-10, 10, 3)
    region = pixels[rows, columns]
    region += mask[..., None] * (color.astype(np.float32) - region)  # `region` is a view, so this paints `pixels`
    owner[rows, columns][mask > 0.5] = number


def summary(scene):
    """One line about a scene, for logs: 'red circle, blue 7'."""
    return ", ".join(f"{placed.color} {placed.kind}" for placed in scene.objects)


def categories_present(scene):
    """Set of the categories ('shape', 'digit', 'letter') that occur in the scene."""
    return {category_of(placed.kind) for placed in scene.objects}
