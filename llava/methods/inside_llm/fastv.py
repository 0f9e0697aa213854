"""FastV (arXiv 2403.06764): after the first layers, only vision tokens that the prompt's last token attends to stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llava.methods.attention_rows import RowAttention
from llava.methods.inside_llm.base import ImageSlots
from llava.methods.inside_llm.one_cut import OneCut


@dataclass(frozen=True)
class FastV(OneCut):
    """One cut between layers `layer` - 1 and `layer`: the vision tokens with the highest attention stay.

    layer: see OneCut. The default is the paper's 2; the authors' demo uses 3.

    The score is the last prompt token's attention in layer `layer` - 1, mean over heads: one attention row. Kept tokens
    keep their positions. The cost is H x S dot products of head size. Layers before the cut save no time, and their KV
    caches save no memory.
    """

    def score(self, attention: RowAttention, image: ImageSlots) -> Tensor:
        last = attention.last()
        return image.of(attention.mean(last))
