"""no_image: no vision token is kept. It measures what the LLM can guess from the question alone."""

from dataclasses import dataclass

from torch import Tensor

from llava.methods.before_llm.base import ImageTokens, Selection, Selector, take


@dataclass
class NoImage(Selector):
    """Keeps none of the N tokens, whatever the budget. The vision tower does not run."""

    needs_image = False
    uses_budget = False
    ignored_options = ("detail_share",)
    reads_text = False

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        return take(image, image.patches[:0])
