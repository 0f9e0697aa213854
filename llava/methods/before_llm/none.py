"""none: every vision token, newline tokens included. The plain model, and what all others are compared with."""

from dataclasses import dataclass

from torch import Tensor

from llava.methods.before_llm.base import ImageTokens, Selection, Selector, take_all


@dataclass
class KeepAll(Selector):
    """Keeps all N tokens whatever the budget."""

    uses_budget = False

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        return take_all(image)
