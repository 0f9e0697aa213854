"""Second stage of ApET (arXiv 2602.19870): its rule once more, on the states of half of the LLM's layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.common.errors import UserError
from llava.common.transfer import to_host_together
from llava.methods.attention_rows import RowAttention
from llava.methods.before_llm.apet import absorb, basis_size, divide, farthest_from_mean, sources_of
from llava.methods.inside_llm.base import Choice, Dropper, ImageSlots
from llava.methods.inside_llm.plan import AFTER, Cut, scaled_layer

LAYER = 16  # layers of 32 that see the tokens of the first stage
SHARE = 3  # one token in three stays, as in the published pairs 96 -> 32, 192 -> 64 and 288 -> 96


@dataclass(frozen=True)
class ApETStage(Dropper):
    """One cut after half of the layers: a third of each image's tokens stay, at least one, and absorb the others.

    This is no value of the key `method`: options.second_stage adds it to `apet`. States are those after the layer. All
    tokens of the image in the LLM are candidates, those of all tiles together. Tokens stay in their order, each basis
    token and each absorbing token in its own place, and positions are counted anew.

    The first basis token is the one farthest from the mean of all, as in the first stage. If the image ends the prompt,
    it is the last token: the answer is read from it, and basis tokens stay as they are.

    The authors' code differs in two points. Its basis tokens stand in the places of other tokens, in the order of their
    errors. In LLaVA-1.6 it cuts only the tokens of the whole-image tile.
    """

    place = AFTER
    reindexed = True
    merges = True

    @classmethod
    def from_config(cls, config) -> ApETStage | None:
        """Return the stage that an AdaVConfig asks for; None where it asks for none."""
        return cls() if config.method_options.get("second_stage") else None

    def check(self, model_config) -> None:
        if model_config.num_hidden_layers < 2:
            raise UserError(
                f'"options.second_stage" is true, but the LLM has {model_config.num_hidden_layers} layer, so only false is allowed'
            )

    def plan(self, n: int, k: int, layers: int) -> tuple[Cut, ...]:
        basis = basis_size(k)
        # A cut after the last layer would save nothing.
        return (Cut(scaled_layer(LAYER, layers, layers - 1) - 1, basis, k - basis),)

    def explicit(self, n: int, layers: int) -> tuple[Cut, ...]:
        left = max(1, n // SHARE)
        return self.plan(n, left, layers) if left < n else ()

    def select(self, attention: RowAttention, cut: Cut, image: ImageSlots, hidden: Tensor) -> Choice:
        states = torch.nan_to_num(image.of(hidden).float(), nan=0.0, posinf=0.0, neginf=0.0)
        last = torch.full((1,), image.count - 1, device=states.device)
        parts = divide(states, cut.keep + cut.made, last if image.ends_prompt else farthest_from_mean(states))
        made, group = absorb(states, parts.absorbing, parts.absorbed)
        kept = torch.sort(parts.basis).values
        numbers = torch.cat([kept, torch.arange(image.count, image.count + cut.made, device=kept.device)])
        order = numbers[torch.argsort(torch.cat([kept, parts.absorbing]))]
        sources = [members for _, members in sources_of(*to_host_together(parts.absorbing, parts.absorbed, group))]
        return Choice(kept, made.to(hidden.dtype), sources, order)
