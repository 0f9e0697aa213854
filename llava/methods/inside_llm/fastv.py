"""FastV (arXiv 2403.06764): after the first layers, only vision tokens that the prompt's last token attends to stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llava.common.errors import UserError
from llava.methods.attention_rows import RowAttention
from llava.methods.inside_llm.base import Dropper, ImageSlots
from llava.methods.inside_llm.plan import AFTER, Cut


@dataclass(frozen=True)
class FastV(Dropper):
    """One cut between layers `layer` - 1 and `layer`: the vision tokens with the highest attention stay.

    layer: how many layers see every token, at least 1 and at most L - 1. It is not scaled to the depth of the LLM. The
        default is the paper's 2; the authors' demo uses 3.

    The score is the last prompt token's attention in layer `layer` - 1, mean over heads: one attention row. Kept tokens
    keep their positions. The cost is H x S dot products of head size. Layers before the cut save no time, and their KV
    caches save no memory.
    """

    layer: int = 2

    place = AFTER

    def check(self, model_config) -> None:
        super().check(model_config)
        if self.layer > model_config.num_hidden_layers - 1:
            raise UserError(
                f"options.layer is {self.layer}, but the LLM has {model_config.num_hidden_layers} layers, so at most "
                f"{model_config.num_hidden_layers - 1} is allowed"
            )

    def plan(self, n: int, k: int, layers: int) -> tuple[Cut, ...]:
        # AFTER layer `layer` - 1 (0-based), so that `layer` layers have seen every token.
        return (Cut(self.layer - 1, k),)

    def score(self, attention: RowAttention, image: ImageSlots) -> Tensor:
        last = attention.last()
        return image.of(attention.mean(last))
