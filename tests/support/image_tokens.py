"""Random vision tokens of an image in any grid, as a selector sees them."""

from __future__ import annotations

import math

import torch

from llava.methods.before_llm import ImageTokens, TowerStates

SIDE, WIDTH = 13, 16
TOWER_WIDTH, KEY_WIDTH = 12, 4

# Grids of crops, and further arguments of make_image: one tile, and crops of which unpadding cuts rows or columns.
SETTINGS = [
    (None, {}),
    ((1, 2), {"cut": 2}),
    ((2, 2), {"cut": 3}),
    ((3, 1), {"cut": 1}),
    ((1, 3), {"side": 6, "cut": 2}),
]


def layout(grid, side=SIDE, cut=2, newline=True):
    """(tile, row, column) of every token in LLM order, slot by slot: the thumbnail, then the merged crops.

    `cut` rows are removed at the top and the bottom of wide grids, columns at both sides of the others.
    """
    slots = [(0, r, c) for r in range(side) for c in range(side)]
    if grid is None:
        return slots + ([(-1, side, -1)] if newline else [])
    across, down = grid
    top, left = (cut, 0) if across > down else (0, cut)
    for r in range(top, down * side - top):
        for c in range(left, across * side - left):
            slots.append((1 + (r // side) * across + c // side, r % side, c % side))
        if newline:
            slots.append((-1, r - top, -1))
    return slots


def make_image(grid=(2, 2), seed=0, dtype=torch.float32, width=WIDTH, key=0, **layout_options):
    tile, row, column = torch.tensor(layout(grid, **layout_options)).T
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(tile), width, generator=generator).to(dtype)
    saliency = torch.rand(len(tile), generator=generator) ** 4 / 100
    saliency[tile < 0] = math.nan
    tower = make_tower(int(tile.max()) + 1, layout_options.get("side", SIDE), features, generator)
    return ImageTokens(features, saliency, tile, row, column, key, tower)


def make_tower(tiles, side, features, generator):
    """Every state that a method may ask for; the projector is a random matrix."""
    states = [torch.randn(tiles, 1 + side**2, n, generator=generator) for n in (TOWER_WIDTH, KEY_WIDTH)]
    cosine = torch.rand(tiles, side**2, generator=generator) * 2 - 1
    matrix = torch.randn(TOWER_WIDTH, features.shape[1], generator=generator)
    received = torch.rand(tiles, side**2, 2, generator=generator) ** 3
    return TowerStates(
        lambda hidden: hidden.float() @ matrix, states[0].to(features.dtype), states[1], cosine, received
    )


def make_text(words=6, seed=1, width=WIDTH):
    return torch.randn(words, width, generator=torch.Generator().manual_seed(seed))


def flat_image(features, saliency):
    """One row of patches, for hand-worked cases."""
    n = len(features)
    zeros = torch.zeros(n, dtype=torch.long)
    return ImageTokens(torch.as_tensor(features), torch.as_tensor(saliency), zeros, zeros, torch.arange(n))
