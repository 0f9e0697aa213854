"""PyramidDrop (arXiv 2410.17247): three cuts in geometric steps, so deeper layers see fewer vision tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llava.common.rounding import floor_share
from llava.methods.attention_rows import RowAttention
from llava.methods.inside_llm.base import Dropper, ImageSlots
from llava.methods.inside_llm.plan import BEFORE, Cut, counts_of, one_per_layer, scaled_layer

LAYERS = (8, 16, 24)  # layers of 32 that have run before each cut


@dataclass(frozen=True)
class PyramidDrop(Dropper):
    """Cuts at 1/4, 1/2 and 3/4 of the depth, to n x, n x^2 and k tokens, where x = (k / n)^(1/3).

    keep: the three numbers instead of a budget, none above the one before it: counts, or shares of n below 1
        (published: 0.5, 0.25, 0.125)

    The score is the last prompt token's attention over all keys, mean over heads: one attention row per cut. It is
    computed with the norm and the query and key projections of the layer behind the cut. Positions are counted anew
    after each cut.
    """

    keep: tuple | None = None

    place = BEFORE
    reindexed = True

    def __post_init__(self):
        self._states_every_cut("keep")

    def plan(self, n: int, k: int, layers: int) -> tuple[Cut, ...]:
        x = (k / n) ** (1 / 3)
        return self._cuts((floor_share(x, n), floor_share(x * x, n), k), n, layers)

    def explicit(self, n: int, layers: int) -> tuple[Cut, ...] | None:
        return None if self.keep is None else self._cuts(counts_of(self.keep, n), n, layers)

    def _cuts(self, counts, n: int, layers: int) -> tuple[Cut, ...]:
        places = [scaled_layer(layer, layers, layers - 1) for layer in LAYERS]
        return one_per_layer([Cut(*pair) for pair in zip(places, counts, strict=True)], n)

    def score(self, attention: RowAttention, image: ImageSlots) -> Tensor:
        last = attention.last()
        return image.of(attention.mean(last))
