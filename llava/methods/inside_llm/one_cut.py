"""Base of methods that cut once, after a number of layers that the user states."""

from __future__ import annotations

from dataclasses import dataclass

from llava.common.errors import UserError
from llava.methods.inside_llm.base import Dropper
from llava.methods.inside_llm.plan import AFTER, Cut


@dataclass(frozen=True)
class OneCut(Dropper):
    """One cut between layers `layer` - 1 and `layer`.

    layer: how many layers see every token, at least 1 and at most L - 1. It is not scaled to the depth of the LLM.
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
