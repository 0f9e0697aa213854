"""downsample: the image itself is made smaller, so that it costs at most K tokens. A baseline (arXiv 2510.07143)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from llava.common.errors import UserError
from llava.methods.before_llm.base import ImageTokens, Selection, Selector, take_all


def smaller_side(side: int, budget: int, newlines: int) -> int:
    """Return the largest side of a square grid of patches that costs at most `budget` tokens, at most `side`.

    newlines: newline tokens at the end of a picture of one tile, 0 or 1. UserError where even one patch costs more.
    """
    if budget <= newlines:
        raise UserError(
            f"method 'downsample' got a budget of {budget}, allowed is at least {1 + newlines}: one patch"
            + (" and the newline token behind it" if newlines else "")
        )
    return min(side, math.isqrt(budget - newlines))


def cells(side: int, smaller: int) -> list[list[int]]:
    """Return, for each patch of a grid of `smaller` x `smaller`, the patches of a grid of `side` x `side` in its place.

    A patch belongs to the cell that has its centre. Patches are numbered in raster order.
    """
    found: list[list[int]] = [[] for _ in range(smaller**2)]
    for row in range(side):
        for column in range(side):
            # (x + 1/2) * smaller / side, rounded down, in integers.
            down, right = ((2 * x + 1) * smaller // (2 * side) for x in (row, column))
            found[down * smaller + right].append(row * side + column)
    return found


@dataclass
class Downsample(Selector):
    """A smaller picture in place of a choice of tokens: a square grid of g x g patches, the largest of at most K tokens.

    The picture of tile 0, which shows the whole image, is resized to g x g patches (bicubic, antialiased), and the
    tower's position embeddings are interpolated to this grid (bicubic). An image of several tiles keeps tile 0 alone. An
    image that has at most K patches stays as it is, as with every method. The number of tokens is g^2, one more where a picture of one tile
    ends with a newline token; it is below K unless K is such a number, and it is what reports state.

    The model makes the picture smaller when it encodes the image (LlavaMetaForCausalLM.encode); this class states that
    it has to, and keeps all tokens of what it gets. Neither saliency nor question is read. It costs less than any
    selection, because the tower runs on fewer patches, too.
    """

    reads_text = False
    uses_budget = False
    ignored_options = ("detail_share",)
    makes_tokens = True
    resizes = True

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        return take_all(image)
