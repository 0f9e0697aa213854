"""options.detail_share: patches whose pixels have fine detail get a part of the budget, whatever the method chooses.

Answers about text depend on a few patches with thin strokes, and methods that rate patches by saliency or similarity may
drop them. The detail of a patch is the gradient energy of its own pixels, which needs no training and no attention. A
method sees the patches that are kept for their detail as it sees newline tokens: they are no candidates.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from llava.common.rounding import floor_share
from llava.common.transfer import to_host
from llava.methods.before_llm.base import ImageTokens, Selection
from llava.methods.ranking import lowest_index_topk


def gradient_energy(pixels: Tensor, bounds: Tensor, patch: int) -> Tensor:
    """Return the gradient energy of each patch, [T, P] float32: squared differences of neighbouring pixels.

    pixels [T, C, H, W]: tiles as the tower reads them; bounds [T, 4]: top, bottom, left and right of the picture in each
    tile, in pixels (mm_utils.picture_bounds); patch: pixels per side of a patch. The energy is the mean over the pairs
    of horizontal neighbours plus the mean over the pairs of vertical neighbours, both summed over channels. Pairs that
    are not inside one patch, and pairs with a pixel of padding, count as equal.
    """
    pixels = pixels.float()
    top, bottom, left, right = bounds[:, :, None].unbind(dim=1)
    row, column = (torch.arange(length, device=pixels.device) for length in pixels.shape[2:])
    inside = ((row >= top) & (row < bottom))[:, :, None] & ((column >= left) & (column < right))[:, None]
    across = pixels.diff(dim=3).square().sum(dim=1) * (inside[:, :, 1:] & inside[:, :, :-1])
    down = pixels.diff(dim=2).square().sum(dim=1) * (inside[:, 1:] & inside[:, :-1])
    # With the stride of a patch, a window leaves out the pairs that reach into the next patch.
    return (avg_pool2d(across, (patch, patch - 1), patch) + avg_pool2d(down, (patch - 1, patch), patch)).flatten(1)


def finest_patches(images: list[ImageTokens], budgets: list[int], share: float) -> list[tuple[Tensor, Tensor]]:
    """Return the patches with the most detail of each image, as indices [F] of tokens: (on its device, on the host).

    F is floor(share * budget), or the number of patches with any detail where that is smaller. Equal patches: the lowest
    index first. Reads ImageTokens.detail.
    """
    found = []
    for image, budget in zip(images, budgets, strict=True):
        detail = torch.nan_to_num(image.detail[image.patches])
        best = lowest_index_topk(detail, floor_share(share, budget))
        # The mark goes to the end of the list, because such patches have the least detail.
        found.append(image.patches[best].masked_fill(detail[best] <= 0, -1))
    # One copy for the whole batch, because a copy to the host waits for the device.
    on_host = [own[own >= 0] for own in to_host(torch.cat(found)).split([len(own) for own in found])]
    return [(own[: len(places)], places) for own, places in zip(found, on_host, strict=True)]


def without(image: ImageTokens, tokens: Tensor) -> ImageTokens:
    """Return the image in which the tokens at `tokens` (indices on the host) are no patches, so no method chooses them."""
    places = image.on_host.without(tokens)
    device = image.features.device
    return replace(image, **{name: places.on(device, name) for name in ("tile", "row", "column")}, places=places)


def with_finest(image: ImageTokens, tokens: Tensor, chosen: Selection | None) -> Selection:
    """Return the Selection that has the patches at `tokens` [F] and what a method chose; None: it chose nothing.

    Patches stand in LLM order. A token that the method made stays behind the token that the method put before it.
    report["detail"]: bool [K], True for the patches at `tokens`.
    """
    indices, features = tokens, image.read(tokens)
    if chosen is None:
        chosen = Selection(indices[:0], features[:0])
    # The largest index so far, so that -1 of a made token does not move it to the front.
    reached = chosen.indices.cummax(dim=0).values if len(chosen.indices) else chosen.indices
    order = torch.sort(torch.cat([reached, indices]), stable=True).indices
    chosen.report["detail"] = order >= len(chosen.indices)
    chosen.indices = torch.cat([chosen.indices, indices])[order]
    chosen.features = torch.cat([chosen.features, features.to(chosen.features)])[order]
    return chosen
