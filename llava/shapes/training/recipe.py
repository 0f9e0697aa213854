"""What is trained, in which order, for how many steps: the whole recipe as data.

Step counts and seeds are fixed and nothing looks at the clock, so a rerun gives the same model on the same machine
with the same number of threads (another number adds up in another order).
"""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Sizes:
    """Shapes of the demo model. The tower's last layer is there because LLaVA reads the layer before it."""

    image_size: int = 96
    patch_size: int = 8
    width: int = 128
    tower_layers: int = 5
    tower_mlp: int = 384
    heads: int = 4
    llm_layers: int = 4
    llm_mlp: int = 320
    rope_theta: float = 1e6

    @property
    def side(self):
        """Patches per side of a tile."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    name            letter in file names and logs
    first_image     index of its first picture in the training split; it sees `steps * batch` pictures, once each
    fresh_llm       layers of the LLM to start anew with (None: go on with what is there)
    grow_to         layers of the LLM to grow to; the new ones pass everything through until they have learned
    train_tower     False freezes the vision tower (no gradient goes through it)
    hard_captions   the caption loss reads what [CLS] takes in by attention in the last trained layer, and tells the caption
                    from copies with one word changed; without it, it reads the [CLS] state and other pictures' captions
    answers         False leaves the LLM out: only the tower's two losses are trained, tile by tile
    jitter          share of pictures whose image positions are compressed at random (no token is dropped)
    sparse          share of pictures that lose a random part of their background patches (of no object, ever)
    lookup          weight of the loss that makes existence questions look the object up half-way (losses.lookup_loss)
    weights         how often each question type is asked, in the order color, exists, where, count
    flatness, evenness  weights of the two variances in the alignment loss (losses.alignment_loss)
    """

    name: str
    steps: int
    lr: float
    first_image: int
    batch: int = 32
    questions: int = 8
    fresh_llm: int | None = None
    grow_to: int | None = None
    train_tower: bool = False
    hard_captions: bool = False
    answers: bool = True
    jitter: float = 0.0
    weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    lookup: float = 0.0
    sparse: float = 0.0
    flatness: float = 100.0
    evenness: float = 0.0
    seed: int = 0

    @property
    def images(self):
        """Half-open range of picture indices that this stage sees."""
        return self.first_image, self.first_image + self.steps * self.batch


@dataclass(frozen=True)
class Recipe:
    """A checkpoint's recipe.

    start      folder under playground/ whose weights it starts from (None: from nothing)
    processes  each takes an equal part of every batch, and gradients are averaged
    """

    family: str
    stages: tuple[Stage, ...]
    start: str | None = None
    alignment: bool = True
    sizes: Sizes = field(default_factory=Sizes)
    pinpoints: tuple[tuple[int, int], ...] | None = None
    validation_images: int = 400
    processes: int = 1


_MIX = (1.0, 2.0, 1.3, 1.0)
_EXISTS = (0.7, 3.0, 1.0, 0.7)
_COUNTED = (0.6, 2.0, 1.0, 0.8, 0.0, 0.0, 1.0, 2.0)
_ALL = (0.8, 1.2, 2.0, 1.4)
_PRACTICE = (0.7, 2.0, 1.0, 0.7, 1.3, 0.8)
V15 = Recipe(
    family="v1.5",
    stages=(
        Stage("A", steps=1000, lr=2e-3, first_image=0, fresh_llm=3, train_tower=True, seed=1),
        Stage(
            "B",
            350,
            lr=1.5e-3,
            first_image=40_000,
            grow_to=4,
            train_tower=True,
            hard_captions=True,
            weights=_MIX,
            seed=2,
        ),
        Stage("C", steps=550, lr=1.5e-3, first_image=51_200, weights=_PRACTICE, jitter=0.3, seed=3),
        Stage("D", steps=380, lr=1.5e-3, first_image=70_000, weights=_EXISTS, jitter=0.3, lookup=0.5, seed=4),
        Stage("E", steps=400, lr=1.5e-3, first_image=90_000, weights=_COUNTED, jitter=0.3, seed=5),
        Stage("F", steps=400, lr=1.5e-3, first_image=103_000, weights=_COUNTED, jitter=0.3, seed=6),
        Stage("G", steps=300, lr=1e-3, first_image=116_000, weights=_MIX, jitter=0.3, sparse=0.6, seed=7),
        Stage(
            "H",
            steps=300,
            lr=1.5e-3,
            first_image=126_000,
            weights=_ALL,
            jitter=0.5,
            sparse=0.9,
            flatness=30_000.0,
            evenness=1000.0,
            seed=8,
        ),
    ),
)
# (width, height), in the order in which ties are decided.
PINPOINTS = ((96, 192), (192, 96), (192, 192), (288, 96), (96, 288))
_TILED = {"batch": 16, "questions": 16, "jitter": 0.3, "sparse": 0.7, "flatness": 30_000.0, "evenness": 1000.0}
V16 = Recipe(
    family="v1.6",
    start="llava-shapes-v1.5",
    pinpoints=PINPOINTS,
    stages=(
        Stage("A", steps=480, lr=1.5e-3, first_image=0, weights=(0.8, 1.2, 2.2, 1.6), seed=11, **_TILED),
        Stage("B", steps=240, lr=1e-3, first_image=10_000, weights=(0.7, 1.0, 2.6, 1.6), seed=12, **_TILED),
    ),
)
RECIPES = {"v1.5": V15, "v1.5-no-alignment": replace(V15, alignment=False), "v1.6": V16}
