"""none: every vision token is kept, newline tokens included. This is the plain model, the reference of all methods."""

from dataclasses import dataclass

from torch import Tensor

from llava.methods.before_llm.base import ImageTokens, Selection, Selector, take_all


@dataclass
class KeepAll(Selector):
    """Keeps all N tokens, whatever the budget."""

    uses_budget = False
    ignored_options = ("detail_share",)
    reads_text = False

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        return take_all(image)
