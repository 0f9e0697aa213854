"""HiPrune: recorded choices of the authors' code, cases worked by hand, and a naive reference."""

from pathlib import Path

import numpy as np
import pytest
import torch
from image_tokens import SETTINGS, make_image, make_text

from llava.common.errors import UserError
from llava.methods.before_llm import ImageTokens, TowerStates, select
from llava.methods.before_llm.hiprune import anchor_counts
from llava.methods.before_llm.tiles import split_evenly

RECORDED = np.load(Path(__file__).parents[1] / "data/hiprune_choices.npz")
NO_TEXT = torch.ones(1, 4)


def one_tile(middle, deep):
    """A tile of which only the received attention matters."""
    count, side = len(middle), round(len(middle) ** 0.5)
    patch = torch.arange(count)
    received = torch.stack([torch.as_tensor(middle), torch.as_tensor(deep)], dim=-1)[None].float()
    tower = TowerStates(lambda states: states, received=received)
    return ImageTokens(torch.zeros(count, 4), torch.zeros(count), patch * 0, patch // side, patch % side, tower=tower)


@pytest.mark.parametrize("case, count", [(1, 64), (2, 128), (3, 192)])
@pytest.mark.parametrize("suffix, share", [("", 0.1), ("_a50", 0.5)])
def test_recorded_choices(case, count, suffix, share):
    image = one_tile(RECORDED[f"{case}_received_middle"], RECORDED[f"{case}_received_deep"])
    kept = select("hiprune", image, NO_TEXT, count, compat="public", anchor_share=share)
    assert kept.indices.tolist() == RECORDED[f"{case}_hiprune_{count}{suffix}"].tolist()
    ours = select("hiprune", image, NO_TEXT, count, anchor_share=share)
    # Neighbours over line ends and in the corners are few: they are what differs.
    assert len(ours.indices) == count and len(set(ours.indices.tolist()) & set(kept.indices.tolist())) >= count - 2


def test_anchors_by_hand():
    # round(19.2 / 5) = 4, round(12.8 / 5) = 3, round(6.4 / 5) = 1; 25 gives 0.5 and 75 gives 1.5: to the even number.
    assert anchor_counts([192, 128, 64, 25, 75, 7], 0.1) == [4, 3, 1, 0, 2, 0]


def test_by_hand():
    # 4 x 4 patches, K = 8, half of it for anchors: round(4 / 5) = 1 anchor. The middle layer's best is patch 7, at the
    # end of row 1: 6 to its left, 3 above, 11 below, and none to its right. The deep layer rises with the number, so
    # 15, 14, 13 and 12 fill the eight.
    middle = torch.zeros(16)
    middle[7] = 1
    deep = torch.arange(16) / 100
    kept = select("hiprune", one_tile(middle, deep), NO_TEXT, 8, anchor_share=0.5)
    assert kept.indices.tolist() == [3, 6, 7, 11, 12, 13, 14, 15]
    # In the authors' code the neighbour to the right of 7 is 8, the first of the next row.
    kept = select("hiprune", one_tile(middle, deep), NO_TEXT, 8, anchor_share=0.5, compat="public")
    assert kept.indices.tolist() == [3, 6, 7, 8, 11, 13, 14, 15]
    # Patch 1: 0, 2 and 5 beside it. In the authors' code the one above is 1 - 4, which becomes 0.
    middle[1] = 2
    for compat in (None, "public"):
        kept = select("hiprune", one_tile(middle, deep), NO_TEXT, 8, anchor_share=0.5, compat=compat)
        assert kept.indices.tolist() == [0, 1, 2, 5, 12, 13, 14, 15]
    # The corner 15 has itself as its neighbours there; nothing is chosen twice.
    middle[15] = 3
    for compat in (None, "public"):
        kept = select("hiprune", one_tile(middle, deep), NO_TEXT, 8, anchor_share=0.5, compat=compat)
        assert kept.indices.tolist() == [8, 9, 10, 11, 12, 13, 14, 15]
    # Three tokens, all for anchors: round(3 / 5) = 1, and of its neighbours 11 and 14 both fit.
    assert select("hiprune", one_tile(middle, deep), NO_TEXT, 3, anchor_share=1).indices.tolist() == [11, 14, 15]
    # 5, whose four neighbours would make five: the two of highest deep attention stay.
    middle[5] = 4
    assert select("hiprune", one_tile(middle, deep), NO_TEXT, 3, anchor_share=1).indices.tolist() == [5, 6, 9]


def test_equal_attention_goes_to_the_lowest_index():
    kept = select("hiprune", one_tile(torch.ones(16), torch.ones(16)), NO_TEXT, 7, anchor_share=0.5)
    assert kept.indices.tolist() == [0, 1, 2, 3, 4, 5, 6]  # anchor 0 with 1 and 4; the others from the front


def naive_hiprune(image, budget, share):
    places = {
        (int(t), int(r), int(c)): i for i, (t, r, c) in enumerate(zip(image.tile, image.row, image.column, strict=True))
    }
    tiles = sorted({tile for tile, _, _ in places if tile >= 0})
    members = [sorted(place for place in places if place[0] == tile) for tile in tiles]
    side = round(image.tower.received.shape[1] ** 0.5)

    def received(place, layer):
        return float(image.tower.received[place[0], place[1] * side + place[2], layer])

    chosen = []
    for tile, quota in zip(members, split_evenly(budget, [len(tile) for tile in members]), strict=True):
        best = sorted(tile, key=lambda place: -received(place, 0))[: round(quota * share / 5)]
        near = {(t, r + down, c + right) for t, r, c in best for down, right in ((0, 1), (0, -1), (1, 0), (-1, 0))}
        rank = {place: 2 if place in best else 1 if place in near else 0 for place in tile}
        chosen += sorted(tile, key=lambda place: (-rank[place], -received(place, 1)))[:quota]
    return sorted(places[place] for place in chosen)


@pytest.mark.parametrize("grid, layout", SETTINGS, ids=str)
@pytest.mark.parametrize("budget", [1, 7, 29, 60])
def test_equals_the_naive_rule(grid, layout, budget):
    for share in (0, 0.1, 0.6, 1):
        image = make_image(grid, seed=budget, **layout)
        kept = select("hiprune", image, make_text(), budget, anchor_share=share)
        assert kept.indices.tolist() == naive_hiprune(image, budget, share), share


def test_public_tiles_have_equal_shares_rounded_down():
    image = make_image((2, 2), side=6, cut=0, newline=False)
    kept = select("hiprune", image, make_text(), 64, compat="public")
    assert torch.bincount(kept.tile).tolist() == [12] * 5
    with pytest.raises(UserError, match="a budget of 4 over 5 tiles down to nothing, allowed is at least 5"):
        select("hiprune", image, make_text(), 4, compat="public")
    with pytest.raises(UserError, match="newline tokens"):
        select("hiprune", make_image((2, 2)), make_text(), 64, compat="public")


@pytest.mark.parametrize("value", [-0.1, 1.1, "0.1", True])
def test_a_bad_share_is_a_sentence(value):
    with pytest.raises(UserError, match="'anchor_share' is .* allowed is a number from 0 to 1"):
        select("hiprune", make_image(), make_text(), 7, anchor_share=value)
