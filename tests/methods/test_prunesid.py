"""PruneSID: recorded choices of the authors' code, cases worked by hand, and a naive reference."""

import numpy as np
import pytest
import torch
from image_tokens import make_image, make_text
from recorded_choices import CASES, recorded, recorded_tile

from llava.methods.before_llm import select, select_all
from llava.methods.before_llm.prunesid import component_groups, group_quotas, not_suppressed
from llava.methods.before_llm.tiles import split_evenly


def public(image, budget):
    kept = select("prunesid", image, make_text(0), budget, compat="public")
    assert kept.indices[0] == -1 and kept.sources == [[]]
    # The file counts [CLS] as 0 and patches from 1.
    return (kept.indices + 1).tolist()


@pytest.mark.parametrize("case, budget", CASES)
def test_recorded_choices(case, budget):
    """The states have exactly K // 4 components, so the randomised search of the public code finds the exact ones."""
    image = recorded_tile(case, hidden="prunesid_hidden")
    assert public(image, budget) == recorded(f"{case}_prunesid_{budget}").tolist()
    ours = select("prunesid", image, make_text(0), budget)
    assert len(ours.indices.unique()) == budget and (ours.indices >= 0).all()


@pytest.mark.parametrize("case, budget", CASES)
def test_recorded_choices_for_given_groups(case, budget, monkeypatch):
    """States without such a structure, with the groups that the randomised search of the recorded run gave."""
    groups = recorded(f"{case}_prunesid_{budget}_random_groups").long()[None]
    monkeypatch.setattr("llava.methods.before_llm.prunesid.component_groups", lambda *_: groups)
    assert public(recorded_tile(case), budget) == recorded(f"{case}_prunesid_{budget}_random").tolist()


def test_groups_by_hand():
    # Patches 0 and 2 differ from 0.5 in channel 0, patches 1 and 3 in channel 2, and less. So the first component is that
    # of patches 0 and 2, with opposite signs, and the second one that of 1 and 3.
    states = torch.tensor([[[4.0, 0, 0, 0], [0, 0, 1, 0], [-4, 0, 0, 0], [0, 0, 1, 0]]])
    real = torch.ones(1, 4, dtype=torch.bool)
    assert component_groups(states, real, [2]).tolist() == [[0, 1, 0, 1]]
    # There are two components only; more are not made up. One component: one group. Equal states: no component at all.
    assert component_groups(states, real, [4]).tolist() == [[0, 1, 0, 1]]
    assert component_groups(states, real, [1]).tolist() == [[0, 0, 0, 0]]
    assert component_groups(torch.zeros(1, 4, 4), real, [2]).tolist() == [[0, 0, 0, 0]]


def test_groups_are_those_of_a_singular_value_decomposition():
    states = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(0))
    data = torch.sigmoid(states.double()).mT.numpy()
    data = data - data.mean(axis=1, keepdims=True)
    for tile, count in enumerate((5, 2, 30)):
        vectors = np.linalg.svd(data[tile])[2][:count]
        groups = component_groups(states, torch.ones(3, 40, dtype=torch.bool), [5, 2, 30])
        assert groups[tile].tolist() == np.abs(vectors).argmax(axis=0).tolist()


def test_suppression_by_hand():
    # 0 suppresses 1, 1 would suppress 2 but is gone, 2 suppresses 3 and 0, which was taken already.
    conflict = torch.zeros(1, 4, 4, dtype=torch.bool)
    for one, other in ((0, 1), (1, 2), (2, 3), (2, 0)):
        conflict[0, one, other] = True
    assert not_suppressed(conflict).tolist() == [[True, False, True, False]]


def quotas(winners, members, budget, wanted=None):
    numbers = (torch.tensor([n]) for n in (winners, members, budget, budget if wanted is None else wanted))
    return group_quotas(*numbers, 100)[0].tolist()


def test_quotas_by_hand():
    # Caps 3, 2, 5 (5 per group up to 64 tokens). One each, 5 of 8 are spare; shares by winners 3, 2, 10 of 15: cumulative
    # 1, 1.67, 5, rounded 1, 2, 5: 1 + 1, 1 + 1, 1 + 3.
    assert quotas([3, 2, 10], [9, 9, 20], 8) == [2, 2, 4]
    # Halves are rounded to even: 2 of 4 are spare, winners 1 and 3: cumulative 0.5, 2: rounded 0, 2.
    assert quotas([1, 3], [9, 9], 4) == [1, 3]
    # 3 of 5 are spare: cumulative 1.5, 3 for equal winners: rounded 2, 3.
    assert quotas([3, 3], [9, 9], 5) == [3, 2]
    # The caps 1, 1, 5 hold 7, but 9 are wanted: they rise once to 2, 2, 6. 6 are spare: 0.5, 1, 6: 0, 1, 6, which is
    # 1 + 0, 1 + 1, 1 + 5.
    assert quotas([1, 1, 10], [9, 9, 20], 9) == [1, 2, 6]
    # A group of one patch cannot rise. The caps hold 1 + 2 + 6 = 9 after one rise and 1 + 3 + 7 = 11 after two. 7 are
    # spare: cumulative 0.58, 1.17, 7, rounded 1, 1, 7: 1 + 1, 1 + 0, 1 + 6. The first is cut to 1. The token goes to the
    # group with the most winners that has room: the last is at its cap, so to the second.
    assert quotas([1, 1, 10], [1, 9, 20], 10) == [1, 2, 7]
    # [CLS] takes one token: the caps follow 4, three are given.
    assert quotas([1, 3], [9, 9], 4, 3) == [1, 2]
    # No patch at all, and groups without members.
    assert quotas([2, 0, 3], [5, 0, 5], 1, 0) == [0, 0, 0] and quotas([2, 0, 3], [5, 0, 5], 4) == [2, 0, 2]


def naive_prunesid(states, saliency, budget):
    """Patches of one tile, with plain loops."""
    count = len(states)
    data = 1 / (1 + np.exp(-states.T))
    data = data - data.mean(axis=0)
    _, values, vectors = np.linalg.svd(data, full_matrices=False)
    use = [c for c in range(max(1, budget // 4)) if c < len(values) and values[c] > 1e-6 * values[0]]
    group = np.abs(vectors[use]).argmax(axis=0)
    unit = states / np.linalg.norm(states, axis=1, keepdims=True)
    cosine = unit @ unit.T
    bar = budget / 32 * (cosine.sum() - count) / (count * (count - 1))
    ranks, winners = {}, {}
    for g in range(max(1, budget // 4)):
        rest = sorted((i for i in range(count) if group[i] == g), key=lambda i: -saliency[i])
        won, lost = [], []
        for i in rest:
            (lost if any(cosine[i, j] > bar for j in won) else won).append(i)
        if rest:
            ranks[g], winners[g] = won + lost, len(won)
    cap = {g: min(5 * -(-budget // 64), len(ranks[g]), winners[g]) for g in ranks}
    while sum(cap.values()) < budget:
        cap = {g: min(cap[g] + 1, len(ranks[g])) for g in ranks}
    spare, total, seen, quota = budget - len(ranks), sum(winners.values()), 0, {}
    for g in ranks:
        before, seen = round(spare * seen / total), seen + winners[g]
        quota[g] = min(1 + round(spare * seen / total) - before, cap[g])
    for g in sorted(ranks, key=lambda g: -winners[g]):
        quota[g] = min(cap[g], quota[g] + budget - sum(quota.values()))
    return sorted(i for g in ranks for i in ranks[g][: quota[g]])


def tiles_of(image):
    places = list(zip(image.tile.tolist(), image.row.tolist(), image.column.tolist(), strict=True))
    return [
        sorted((i for i, place in enumerate(places) if place[0] == tile), key=lambda i: places[i])
        for tile in range(int(image.tile.max()) + 1)
    ]


def states_of(image, tile):
    return torch.stack([image.tower.hidden[image.tile[i], 1 + image.row[i] * 13 + image.column[i]] for i in tile])


@pytest.mark.parametrize("grid", [None, (1, 2), (2, 2)], ids=str)
def test_prunesid_equals_the_naive_rule(grid):
    """Also for images together whose tiles and quotas differ. States with a common part, so that bars are not near 0."""
    images = [make_image(grid, seed=seed, cut=cut) for seed, cut in ((0, 0), (1, 3))]
    for image in images:
        image.tower.hidden += 0.6
    for budget in (1, 7, 29, 58, 130):
        batch = select_all("prunesid", images, [make_text(0)] * 2, budget)
        for image, kept in zip(images, batch, strict=True):
            tiles, expected = tiles_of(image), []
            for tile, quota in zip(tiles, split_evenly(budget, [len(tile) for tile in tiles]), strict=True):
                if quota:
                    chosen = naive_prunesid(
                        states_of(image, tile).double().numpy(), image.saliency[tile].numpy(), quota
                    )
                    expected += [tile[i] for i in chosen]
            assert kept.indices.tolist() == sorted(expected)


def test_the_public_order_of_several_tiles():
    image = make_image((2, 1), cut=0, newline=False)
    kept = select("prunesid", image, make_text(0), 30, compat="public")
    # Ten tokens of each tile: [CLS] and nine patches of tile 0, 18 patches of the crops, their [CLS] tokens.
    assert kept.tile.tolist() == [-1, *[0] * 9, *kept.tile[10:28].tolist(), -1, -1] and kept.sources == [[], [], []]
    made = image.tower.project(image.tower.hidden[:, 0])
    torch.testing.assert_close(kept.features[[0, 28, 29]], made)
    assert torch.equal(kept.features[1:28], image.features[kept.indices[1:28]])
    crops = kept.indices[10:28]
    # The places of a crop's patches, sorted, are those at which its patches stand.
    assert torch.equal(kept.tile[10:28], image.tile[crops.sort().values])
    for tile in (1, 2):
        own = crops[image.tile[crops] == tile].tolist()
        assert len(set(own)) == 9 and own != sorted(own), "group by group"
    ours = select("prunesid", image, make_text(0), 30)
    assert ours.indices.tolist() == sorted(set(ours.indices.tolist())) and len(ours.indices) == 30
    # A budget below the number of tiles: [CLS] of the first ones alone.
    assert select("prunesid", image, make_text(0), 2, compat="public").indices.tolist() == [-1, -1]
