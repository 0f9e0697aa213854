"""FastV (arXiv 2403.06764): after the first layers, only what the prompt's last token attends to stays."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llava.common.errors import UserError
from llava.methods.attention_rows import RowAttention
from llava.methods.inside_llm.base import Dropper, ImageSlots
from llava.methods.inside_llm.plan import AFTER, Cut


@dataclass(frozen=True)
class FastV(Dropper):
    """One cut, on the way into layer `layer`: the image tokens with the highest attention stay.

    layer: how many layers see every token, absolute, at least 1 and at most the LLM's layers - 1. The default is the
        paper's 2; the authors' demo uses 3.

    Reads one row: the last prompt token's attention in layer `layer` - 1, averaged over heads. Survivors keep their
    positions. Costs H x S products of head size. The layers before the cut are not made cheaper, nor their caches.
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
        return (Cut(self.layer - 1, k),)

    def score(self, attention: RowAttention, image: ImageSlots) -> Tensor:
        last = image.queries.new_tensor([attention.length - 1])
        return image.of(attention.mean(last))
