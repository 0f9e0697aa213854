"""Zoom: methods that look at the whole image as one tile first, and encode only the crops that this look points to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from llava.common.errors import UserError
from llava.methods.before_llm.base import ImageTokens, Selector
from llava.methods.before_llm.scores import patch_saliency

# Sums of importance that are equal up to rounding count as equal: a share of 1 must stand for all crops.
ROUNDING = 1e-9


@dataclass
class Zoom(Selector):
    """Base of selectors that can leave crops unencoded. Subclasses choose among the tokens of the encoded tiles.

    The whole image as one tile (tile 0) is encoded first, and gives an importance to each of its patches. The importance
    of a crop is the sum over the parts of these patches that lie in it (mm_utils.crop_overlap); padding has none. Crops
    are encoded in order of importance, ties in raster order. Further crops follow while the encoded tiles have fewer
    patches than the budget, so the budget stays exact. An image of one tile is encoded as it is.

    crops       how many crops are encoded; None: as crop_share says
    crop_share  0 .. 1: as few crops as hold this share of the importance; None with crops None: all crops
    """

    crops: int | None = None
    crop_share: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.crops is not None and self.crop_share is not None:
            raise UserError(
                f"options 'crops' is {self.crops!r} and 'crop_share' is {self.crop_share!r}, allowed is one of them"
            )

    @property
    def zooms(self) -> bool:
        """Whether crops may stay unencoded."""
        return self.crops is not None or self.crop_share is not None

    def importance(self, whole: ImageTokens, text: Tensor, budget: int) -> Tensor:
        """Return the importance of each patch of tile 0, [side**2], at least 0: here the [CLS] saliency.

        whole: the tokens of tile 0. text, budget: as `keep` gets them.
        """
        return patch_saliency(whole)

    def needs_every_crop(self, sizes: Sequence[int], budget: int) -> bool:
        """Return whether all crops are encoded, whatever their importance. sizes [T]: patches of each tile."""
        crops = sum(size > 0 for size in sizes[1:])
        return (self.crops is not None and self.crops >= crops) or budget >= sum(sizes)

    def tiles(self, sizes: Sequence[int], importance: Sequence[float], budget: int) -> tuple[int, ...]:
        """Return the numbers of the tiles that are encoded, ascending; tile 0 is the first.

        sizes [T]: patches of each tile that are left after unpadding. importance [T - 1]: of each crop.
        """
        # Unpadding can leave nothing of a crop.
        crops = [tile for tile in range(1, len(sizes)) if sizes[tile]]
        wanted = (self.crop_share or 0.0) * sum(importance[tile - 1] for tile in crops) * (1 - ROUNDING)
        chosen, held, mass = [0], sizes[0], 0.0
        for tile in sorted(crops, key=lambda tile: -importance[tile - 1]):
            looked = mass >= wanted if self.crops is None else len(chosen) > self.crops
            if looked and held >= budget:
                break
            chosen.append(tile)
            held += sizes[tile]
            mass += importance[tile - 1]
        return tuple(sorted(chosen))
