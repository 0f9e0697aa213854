"""AdaV with zoom (our variant): AdaV's scores on the whole image say which crops are encoded; AdaV chooses among those."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llava.common.errors import UserError
from llava.methods.before_llm.adav import AdaV, best_split, guaranteed_count
from llava.methods.before_llm.base import ImageTokens
from llava.methods.before_llm.scores import patch_saliency, text_to_image
from llava.methods.before_llm.zoom import Zoom

# The smallest number of crops that loses less than three points to all crops: demo checkpoint v1.6, mean over 25, 10 and 5 %
# of the tokens, 400 validation questions. 66.2 % with 1 crop, 77.2 with 2, 79.5 with 3 and 79.8 with all of them
# (benchmarks/adav_zoom_crops.py, benchmarks/results/adav_zoom_crops-validation.csv).
CROPS = 2


@dataclass
class AdaVZoom(Zoom, AdaV):
    """AdaV (adav.py) over the tiles that are encoded, with the crops chosen as in Zoom.

    The importance of a patch of tile 0 is a * t + (1 - a) * s: its text score and its saliency there, each divided by the
    sum over the tile. a is the share that AdaV's split (best_split) of the budget over tile 0 gives to the text score.
    Without text, s alone counts. With all crops, the choice is exactly AdaV's.

    crops, crop_share       as in Zoom; with neither, CROPS crops
    min_share, temperature  as in AdaV

    report: as AdaV's, with NaN for the tokens of crops that are not encoded
    """

    def __post_init__(self):
        super().__post_init__()
        if self.compat is not None:
            raise UserError(
                f"option 'compat' is {self.compat!r}, allowed for adav_zoom is null: the public code encodes all tiles"
            )
        if not self.zooms:
            self.crops = CROPS

    def importance(self, whole: ImageTokens, text: Tensor, budget: int) -> Tensor:
        saliency = patch_saliency(whole)
        if not len(text):
            return _shares(saliency)
        text_score = text_to_image(whole, text, self.temperature)
        budget = min(budget, len(text_score))
        by_text = best_split(text_score, saliency, budget, guaranteed_count(self.min_share, budget)) / budget
        return by_text * _shares(text_score) + (1 - by_text) * _shares(saliency)


def _shares(scores: Tensor) -> Tensor:
    """Return `scores` [P] divided by their sum, float64."""
    scores = scores.double()
    return scores / scores.sum().clamp_min(1e-12)
