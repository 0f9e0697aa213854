"""The training recipes of the demo checkpoints as data: what is trained, in which order, for how many steps.

Step counts and seeds are fixed, and nothing depends on time. A rerun therefore gives the same model on the same machine
with the same number of threads. Another number of threads sums in another order.
"""

from dataclasses import dataclass, field, replace

from llava.shapes.training.data import Asked


@dataclass(frozen=True)
class Sizes:
    """Sizes of the demo model. The tower's last layer is never trained; LLaVA reads the layer before the last."""

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
    first_image     index of the first picture in the training split; the stage reads `steps * batch` pictures once each
    fresh_llm       number of layers of a new LLM (None: keep the present LLM)
    grow_to         number of layers to grow to; new layers change nothing until they are trained
    train_tower     False freezes the vision tower, and no gradient passes through it
    hard_captions   True: the caption loss reads the attention output of [CLS] in the last trained layer, and wrong
                    captions also include the right one with one word changed; False: it reads the [CLS] state, and
                    wrong captions are only those of other pictures
    answers         False leaves the LLM out: only the tower's two losses are trained, tile by tile
    jitter          share of pictures whose image positions are compressed at random; no token is dropped
    sparse          share of pictures that lose a random part of their background patches; patches of objects stay
    least           the smallest part of its background that such a picture loses; few vision tokens make a step cheap
    lookup          weight of the practice loss for existence questions (losses.lookup_loss)
    captions        True: one caption per picture instead of `questions` questions
    weights         how often each question type is asked, in the order of QUESTION_TYPES, then PRACTICE_TYPES
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
    least: float = 0.0
    captions: bool = False
    flatness: float = 100.0
    evenness: float = 0.0
    seed: int = 0

    @property
    def asked(self):
        """What the stage asks about each picture."""
        return Asked(self.questions, self.weights, self.captions)

    @property
    def images(self):
        """Half-open range of the picture indices that this stage reads."""
        return self.first_image, self.first_image + self.steps * self.batch


@dataclass(frozen=True)
class Recipe:
    """Recipe of one checkpoint.

    start      folder under playground/ with the initial weights (None: from scratch)
    shipped    False: the checkpoint is only measured
    processes  number of training processes; each takes an equal part of every batch, and gradients are averaged
    """

    family: str
    stages: tuple[Stage, ...]
    start: str | None = None
    alignment: bool = True
    sizes: Sizes = field(default_factory=Sizes)
    pinpoints: tuple[tuple[int, int], ...] | None = None
    validation_images: int = 400
    shipped: bool = True
    processes: int = 1


# Weights of the question types, in the order color, exists, where, count, named, some, tally, pairs.
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
# (width, height). Of equally good canvases the first one is chosen, so the order matters.
PINPOINTS = ((96, 192), (192, 96), (192, 192), (288, 96), (96, 288))
_FLAT = {"flatness": 30_000.0, "evenness": 1000.0}
_TILED = {"batch": 16, "questions": 16, "jitter": 0.3, "sparse": 0.7, **_FLAT}
V16 = Recipe(
    family="v1.6",
    start="llava-shapes-v1.5",
    pinpoints=PINPOINTS,
    stages=(
        Stage("A", steps=480, lr=1.5e-3, first_image=0, weights=(0.8, 1.2, 2.2, 1.6), seed=11, **_TILED),
        Stage("B", steps=240, lr=1e-3, first_image=10_000, weights=(0.7, 1.0, 2.6, 1.6), seed=12, **_TILED),
    ),
)
# Without the alignment loss: the prompt for captions names nothing that a patch could be similar to. At first, all
# pictures lose most of their background, because few vision tokens make a step cheap.
_CAPTIONS = {"lr": 2e-3, "batch": 16, "captions": True, "jitter": 0.3}
CAPTIONS = Recipe(
    family="v1.5",
    start="llava-shapes-v1.5",
    alignment=False,
    validation_images=100,
    stages=(
        Stage("A", 250, first_image=200_000, sparse=1.0, least=0.75, seed=21, **_CAPTIONS),
        Stage("B", 600, first_image=210_000, sparse=1.0, least=0.75, seed=22, **_CAPTIONS),
        Stage("C", 600, first_image=220_000, sparse=1.0, least=0.5, seed=23, **_CAPTIONS),
        Stage("D", 1500, first_image=230_000, sparse=0.5, seed=24, **_CAPTIONS),
    ),
)
RECIPES = {
    "captions": CAPTIONS,
    "v1.5": V15,
    "v1.5-no-alignment": replace(V15, alignment=False, shipped=False),
    "v1.6": V16,
}
