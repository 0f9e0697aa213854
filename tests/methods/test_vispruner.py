"""VisPruner: recorded choices of the authors' code, cases worked by hand, and a naive reference."""

import numpy as np
import pytest
import torch
from image_tokens import make_image, make_text
from recorded_choices import CASES, recorded, recorded_tile

from llava.methods.before_llm import ImageTokens, TowerStates, select, select_all
from llava.methods.before_llm.tiles import split_evenly
from llava.methods.before_llm.vispruner import list_lengths, thinned


@pytest.mark.parametrize("case, budget", CASES)
def test_recorded_choices(case, budget):
    kept = select("vispruner", recorded_tile(case), make_text(0), budget)
    assert kept.indices.tolist() == recorded(f"{case}_vispruner_{budget}_50").tolist()


def test_lengths_by_hand():
    # Eight are dropped in a round, the rest in the last one; of short lists, at most the even places.
    assert list_lengths(40, 15) == [40, 32, 24, 16] and list_lengths(40, 40) == []
    assert list_lengths(13, 1) == [13, 6, 3] and list_lengths(5, 1) == [5, 2]


def one_round(cosines, listed, length, wanted):
    """cosines: {(a, b): cosine}, 0 for other pairs."""
    similarity = torch.eye(6)
    for (a, b), value in cosines.items():
        similarity[a, b] = similarity[b, a] = value
    numbers = torch.tensor([length]), torch.tensor([wanted])
    left = thinned(similarity[None], torch.tensor([listed]), *numbers, list_lengths(length, wanted))
    return left[0, :wanted].tolist()


def test_thinning_by_hand():
    # The list 5 4 3 2 1 0: even places 5 3 1, odd places 4 2 0. Nearest odd ones: 5 has 0.2, 3 has 0.9, 1 has 0.5. One is
    # dropped: 3. The rest of the even ones by falling cosine, 1 and 5, and then the odd ones.
    cosines = {(5, 4): 0.2, (3, 0): 0.9, (3, 4): 0.1, (1, 2): 0.5}
    assert one_round(cosines, [5, 4, 3, 2, 1, 0], 6, 5) == [1, 5, 4, 2, 0]
    # Two are dropped: 3 and 1.
    assert one_round(cosines, [5, 4, 3, 2, 1, 0], 6, 4) == [5, 4, 2, 0]
    # The cosine of 5 and 3, both at even places, does not count. Without cosines, the first of equals is dropped.
    assert one_round({(5, 3): 1.0}, [5, 4, 3, 2, 1, 0], 6, 5) == [3, 1, 4, 2, 0]
    # Odd length, list 5 4 3 2 1 and padding: even 5 3 1, odd 4 2. The padding, 0, is nobody's neighbour.
    assert one_round(cosines, [5, 4, 3, 2, 1, 0], 5, 4) == [5, 3, 4, 2]
    # Two rounds. First all even places go, and 4 2 0 stay; 4 and 0 are even, 0 is nearer to 2.
    assert one_round({(0, 2): 0.3}, [5, 4, 3, 2, 1, 0], 6, 2) == [4, 2]


def test_vispruner_by_hand():
    # Saliency falls from 0 to 5, K = 3: patch 0 is salient. The list 1 2 3 4 5 is to lose three: even 1 3 5, odd 2 4. All
    # even ones are dropped. With K = 4 and two salient patches, the list is 2 3 4 5: even 2 4, odd 3 5. Both are dropped.
    states = torch.zeros(1, 7, 6)
    states[0, 1:] = torch.eye(6)
    number = torch.arange(6)
    tower = TowerStates(lambda rows: rows, states)
    image = ImageTokens(torch.eye(6), torch.arange(6.0).flip(0), number * 0, number // 6, number % 6, tower=tower)
    assert select("vispruner", image, make_text(0), 3).indices.tolist() == [0, 2, 4]


def naive_vispruner(states, saliency, budget, share):
    """Patches of one tile, with plain lists."""
    unit = states / states.norm(dim=1, keepdim=True)
    cosine = (unit @ unit.T).tolist()
    order = sorted(range(len(saliency)), key=lambda i: -saliency[i])
    first = int(budget * share + 1e-6)
    kept, rest = order[:first], order[first:]
    while len(rest) > budget - first and budget > first:
        even, odd = rest[0::2], rest[1::2]
        twin = {a: max(cosine[a][b] for b in odd) for a in even}
        even.sort(key=lambda a: -twin[a])
        rest = even[min(8, len(rest) - (budget - first), len(even)) :] + odd
    return sorted(kept + rest[: budget - first])


@pytest.mark.parametrize("share", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("grid", [None, (1, 2), (2, 2)], ids=str)
def test_vispruner_equals_the_naive_rule(grid, share):
    """Also for several images together, whose tiles and quotas differ; the states have full precision in both."""
    images = [make_image(grid, seed=seed, cut=cut) for seed, cut in ((0, 0), (1, 3))]
    for budget in (3, 29, 58, 131):
        batch = select_all("vispruner", images, [make_text(0)] * 2, budget, salient_share=share)
        for image, kept in zip(images, batch, strict=True):
            places = list(zip(image.tile.tolist(), image.row.tolist(), image.column.tolist(), strict=True))
            tiles = [
                sorted((i for i, place in enumerate(places) if place[0] == tile), key=lambda i: places[i])
                for tile in range(max(image.tile).item() + 1)
            ]
            expected = []
            for tile, quota in zip(tiles, split_evenly(budget, [len(tile) for tile in tiles]), strict=True):
                states = torch.stack(
                    [image.tower.hidden[image.tile[i], 1 + image.row[i] * 13 + image.column[i]] for i in tile]
                )
                chosen = naive_vispruner(states.double(), image.saliency[tile].tolist(), quota, share)
                expected += [tile[i] for i in chosen]
            assert kept.indices.tolist() == sorted(expected)


def test_any_budget_works():
    """The public code ends with an error for odd lists and for budgets of 4 and 8."""
    image = make_image(None, newline=False)
    for budget in (1, 2, 3, 4, 8, 29, 57, 168):
        for share in (0, 0.25, 0.75, 1):
            kept = select("vispruner", image, make_text(0), budget, salient_share=share).indices
            assert len(kept.unique()) == budget
    salient = select("vispruner", image, make_text(0), 57, salient_share=1).indices
    assert salient.tolist() == np.sort(np.argsort(-image.saliency.numpy(), kind="stable")[:57]).tolist()
