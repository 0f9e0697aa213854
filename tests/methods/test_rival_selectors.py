"""The rules of VisionZip, DivPrune, CDPruner, SCOPE and AdaV with coverage: recorded choices of public code, cases worked
by hand, and naive references."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from image_tokens import flat_image, make_image, make_text

from llava.common.errors import UserError
from llava.methods.before_llm import SELECTORS, ImageTokens, TowerStates, greedy, select, select_all
from llava.methods.before_llm.adav_cover import covering_union
from llava.methods.before_llm.cdpruner import most_diverse
from llava.methods.before_llm.coverage import Coverage
from llava.methods.before_llm.divprune import farthest_points
from llava.methods.before_llm.scope import cover_greedily
from llava.methods.before_llm.similarity import cosine_matrix
from llava.methods.before_llm.tiles import members_of_tiles, split_evenly
from llava.methods.before_llm.two_lists import TwoLists, unions_of_best
from llava.methods.before_llm.visionzip import merge_alike
from llava.model.multimodal_encoder.clip_text_tower import mean_cosine

RECORDED = {
    name: torch.tensor(value) for name, value in np.load(Path(__file__).parents[1] / "data/selector_choices.npz").items()
}
SETTINGS = [
    (None, {}),
    ((1, 2), {"cut": 2}),
    ((2, 2), {"cut": 3}),
    ((3, 1), {"cut": 1}),
    ((1, 3), {"side": 6, "cut": 2}),
]


def union_of_best(first, k_first, second, k_second):
    ((kept, _),) = unions_of_best([TwoLists(first, second, k_first, k_first + k_second)])
    return kept


def recorded_image(tiles=(0, 1)):
    """Tiles of the recorded input in LLM order; the projector only adds zeros, so that a made token shows its state."""
    count, tiles = 576, list(tiles)
    tile = torch.arange(len(tiles)).repeat_interleave(count)
    patch = torch.arange(count).repeat(len(tiles))
    hidden = RECORDED["hidden"][tiles]
    cosine = mean_cosine(RECORDED["clip_image"][tiles], RECORDED["clip_text"])
    tower = TowerStates(
        lambda states: torch.nn.functional.pad(states, (0, 96)), hidden, RECORDED["keys_mean"][tiles], cosine
    )
    features, saliency = RECORDED["features"][tiles].flatten(0, 1), RECORDED["cls_attention"][tiles].mean(1).flatten()
    return ImageTokens(features, saliency, tile, patch // 24, patch % 24, tower=tower)


def per_tile(kept, size=576):
    return [(kept.indices[kept.tile == tile] - size * tile).tolist() for tile in kept.tile.unique().tolist()]


def numpy_cosines(vectors):
    vectors = vectors.double().numpy()
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


def tile_members(image):
    """[[indices of the tokens of a tile, in raster order]], written plainly."""
    places = list(zip(image.tile.tolist(), image.row.tolist(), image.column.tolist(), strict=True))
    tiles = sorted({tile for tile, _, _ in places if tile >= 0})
    return [sorted((i for i, p in enumerate(places) if p[0] == tile), key=lambda i: places[i]) for tile in tiles]


def hidden_of(image, index, states):
    side = math.isqrt(states.shape[1] - 1)
    return states[image.tile[index], 1 + image.row[index] * side + image.column[index]]


# --- recorded choices of the public code -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [8, 29, 64])
def test_recorded_choices(count):
    image, text = recorded_image(), torch.ones(3, 160)
    for name, options in (("scope", {}), ("cdpruner", {"text_tower": "a CLIP"})):
        kept = select(name, image, text, 2 * count, **options)
        assert per_tile(kept) == RECORDED[f"{name}_{count}"].tolist(), name
    kept = select("divprune", recorded_image([0]), text, count)
    assert kept.indices.tolist() == RECORDED[f"divprune_{count}"].tolist()


@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize("dominant, contextual", [(54, 10), (26, 4)])
def test_recorded_visionzip(dominant, contextual, tile):
    image = recorded_image([tile])
    image.features = image.tower.project(image.tower.hidden[0, 1:])
    given = select("visionzip", image, torch.ones(3, 160), 7, dominant=dominant, contextual=contextual)
    assert given.indices[0] == -1 and (given.indices[dominant:] == -1).all()
    patches = given.indices[1:dominant] + 1
    assert [0, *patches.tolist()] == RECORDED[f"visionzip_{dominant}_{contextual}_dominant"][tile].tolist()
    expected = RECORDED[f"visionzip_{dominant}_{contextual}_tokens"][tile]
    torch.testing.assert_close(given.features[:, :64], expected, rtol=0, atol=1e-6)
    if (dominant, contextual) == (54, 10):  # the default ratio
        assert torch.equal(select("visionzip", image, torch.ones(3, 160), 64).features, given.features)


def test_cdpruner_beyond_the_rank_where_the_public_loop_breaks():
    # 160 projected dimensions: after 160 picks of a tile the public loop divides by what rounding has left of zero. Ours
    # goes on with the most relevant of the others.
    image, text = recorded_image(), torch.ones(3, 160)
    kept = select("cdpruner", image, text, 2 * 200, text_tower="a CLIP")
    relevance = kept.report["relevance"].view(2, 576)
    for tile, chosen in enumerate(per_tile(kept)):
        within = select("cdpruner", recorded_image(), text, 2 * 160, text_tower="a CLIP")
        first = set(per_tile(within)[tile])
        assert len(set(chosen)) == 200 and first < set(chosen)
        others = [i for i in relevance[tile].argsort(descending=True).tolist() if i not in first]
        assert set(chosen) - first == set(others[:40])


# --- DivPrune --------------------------------------------------------------------------------------------------------


def test_divprune_by_hand():
    # Directions at 0, 10, 90 and 200 degrees. Nearest neighbours: 10, 10, 80 and 110 degrees away, so 200 is first. From
    # there 0 is 160, 10 is 170 and 90 is 110 degrees away: 10. Then 0 is 10 from 10, and 90 is 80 from 10: 90.
    angles = torch.tensor([0.0, 10, 90, 200]).deg2rad()
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[3.0], [0.1], [7], [1]])
    real = torch.ones(1, 5, dtype=torch.bool)
    assert farthest_points(cosine_matrix(vectors)[None], real[:, 1:], real[:, 1:], 4).tolist() == [[3, 1, 2, 0]]
    assert select("divprune", flat_image(vectors, torch.zeros(4)), make_text(0), 2).indices.tolist() == [1, 3]
    # A broken patch comes last, and is nobody's neighbour.
    broken = torch.cat([torch.tensor([[math.nan, 1.0]]), vectors])
    finite = broken.isfinite().all(dim=1)[None]
    assert farthest_points(cosine_matrix(broken)[None], real, finite, 5).tolist() == [[4, 2, 3, 1, 0]]


def naive_farthest_points(vectors, count):
    distance = 1 - numpy_cosines(vectors)
    picks = [max(range(len(distance)), key=lambda i: np.sort(distance[:, i])[1])]
    while len(picks) < count:
        rest = [i for i in range(len(distance)) if i not in picks]
        picks.append(max(rest, key=lambda i: min(distance[i, j] for j in picks)))
    return picks


@pytest.mark.parametrize("grid, layout", SETTINGS, ids=str)
@pytest.mark.parametrize("budget", [1, 2, 7, 58])
def test_divprune_equals_the_naive_rule(grid, layout, budget):
    image = make_image(grid, seed=budget, **layout)
    expected = image.patches[naive_farthest_points(image.features[image.patches], budget)]
    kept = select("divprune", image, make_text(), budget)
    assert kept.indices.tolist() == expected.sort().values.tolist()


@pytest.mark.parametrize(
    "name", ["divprune", "cdpruner", "scope", "mmtok", "vispruner", "prunesid", "adav_cover", "visionzip", "apet"]
)
@pytest.mark.parametrize("kinds", [1, 2, 5])
def test_equal_patches_are_not_chosen_twice(name, kinds):
    image = make_image((2, 2))
    draw = torch.Generator().manual_seed(kinds)
    for state in (image.features, image.tower.hidden.flatten(0, 1), image.tower.keys.flatten(0, 1)):
        state[:] = state[torch.randint(kinds, (len(state),), generator=draw)].clone()
    for budget in (kinds, 3 * kinds, len(image.patches) - 1):
        kept = select(name, image, make_text(), budget)
        indices = kept.indices[kept.indices >= 0]
        assert len(kept.indices) == budget and len(indices.unique()) == len(indices)
        if name == "divprune" and budget == kinds:
            assert len(kept.features.unique(dim=0)) == kinds, "one of each kind"


# --- CDPruner --------------------------------------------------------------------------------------------------------


def test_most_diverse_by_hand():
    # Relevance 1, 0.9, 0.5, 0.8; the first two are the same direction, the third is at a right angle to them, the fourth
    # halfway (45 degrees). d2 = 1, 0.81, 0.25, 0.64: the first is chosen. What is left of the others is relevance^2 *
    # sin^2: 0, 0.25, 0.32: the fourth. Now two dimensions are used up: the third and the second are left with nothing,
    # and relevance decides: the second.
    vectors = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 1]])
    relevance = torch.tensor([[1, 0.9, 0.5, 0.8]])
    real = torch.ones(1, 4, dtype=torch.bool)
    assert most_diverse(cosine_matrix(vectors)[None], relevance, real, 4).tolist() == [[0, 3, 1, 2]]
    # With equal relevance: ties to the first, then what is farthest from it, the right angle.
    assert most_diverse(cosine_matrix(vectors)[None], torch.ones(1, 4), real, 4).tolist() == [[0, 2, 1, 3]]


def test_relevance_by_hand():
    # Cosines with the nearest word (1, 0): 1, 0.6, -1. Scaled: (2 + 1e-6) / 2, (1.6 + 1e-6) / 2, 1e-6 / 2.
    image = flat_image(torch.tensor([[2.0, 0], [3, 4], [-1, 0]]), torch.zeros(3))
    words = torch.tensor([[5.0, 0], [-0.1, -0.0]])
    report = select("cdpruner", image, words[:1], 1).report
    torch.testing.assert_close(report["relevance"], torch.tensor([1.0, 0.8, 0.0]) + 5e-7)
    # With the second word, (-1, 0), too: 1, 0.6, 1: the nearest counts.
    report = select("cdpruner", image, words, 1).report
    torch.testing.assert_close(report["relevance"], torch.tensor([1.0, 0.0, 1.0]) + 1e-6 / 0.4)
    # theta = 0.5: exp(0.5 r), up to a common factor; theta = 0: all alike.
    report = select("cdpruner", image, words[:1], 1, theta=0.5).report
    torch.testing.assert_close(report["relevance"], torch.tensor([1.0, math.exp(-0.1), math.exp(-0.5)]))
    for options, text in (({"theta": 0}, words), ({}, words[:0])):
        assert torch.equal(select("cdpruner", image, text, 1, **options).report["relevance"], torch.ones(3))


def naive_dpp(kernel, count):
    """Greedy MAP by determinants."""
    picks = []
    while len(picks) < count:
        rest = [i for i in range(len(kernel)) if i not in picks]
        picks.append(max(rest, key=lambda i: np.linalg.slogdet(kernel[np.ix_([*picks, i], [*picks, i])])[1]))
    return picks


@pytest.mark.parametrize("theta", [None, 0.6])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("grid, layout", SETTINGS, ids=str)
def test_cdpruner_equals_the_naive_rule(grid, layout, clip, theta):
    image, text = make_image(grid, width=64, **layout), make_text(width=64)
    members = tile_members(image)
    patches = [index for tile in members for index in tile]
    if clip:
        side = layout.get("side", 13)
        place = [(image.tile[i], image.row[i] * side + image.column[i]) for i in patches]
        relevance = -np.array([float(image.tower.text_cosine[p]) for p in place])
    else:
        v, x = image.features[patches].double().numpy(), text.double().numpy()
        cosine = (v @ x.T) / np.linalg.norm(v, axis=1)[:, None] / np.linalg.norm(x, axis=1)
        relevance = cosine.max(1)
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    if theta is not None:
        relevance = np.exp(theta / (2 * (1 - theta)) * relevance)
    relevance = dict(zip(patches, relevance, strict=True))
    quota = split_evenly(58, [len(tile) for tile in members])
    expected = []
    for tile, count in zip(members, quota, strict=True):
        r = np.array([relevance[i] for i in tile])
        kernel = r[:, None] * numpy_cosines(image.features[tile]) * r
        expected += [tile[i] for i in naive_dpp(kernel, count)]
    options = {"text_tower": "a CLIP"} if clip else {}
    kept = select("cdpruner", image, text, 58, theta=theta, **options)
    assert kept.indices.tolist() == sorted(expected)


def test_cdpruner_without_rank_left_goes_by_relevance():
    image, text = make_image((2, 1), width=8, cut=1), make_text(width=8)
    few, many = (select("cdpruner", image, text, budget) for budget in (3 * 8, 3 * 20))
    place = {int(index): number for number, index in enumerate(image.patches)}
    relevance = few.report["relevance"]
    for tile, members in enumerate(tile_members(image)):
        first = set(few.indices[few.tile == tile].tolist())
        rest = sorted((i for i in members if i not in first), key=lambda i: -float(relevance[place[i]]))
        assert set(many.indices[many.tile == tile].tolist()) == first | set(rest[:12])


# --- SCOPE -----------------------------------------------------------------------------------------------------------

HAND = torch.tensor([[[1, 0.8, 0.6, 0], [0.8, 1, 0.2, 0], [0.6, 0.2, 1, 0], [0, 0, 0, 1]]])


@pytest.fixture(params=[False, True], ids=["changed rows", "all rows"])
def all_rows(request, monkeypatch):
    """Coverage as on a CPU and as on a GPU."""
    monkeypatch.setattr(Coverage, "all_rows", request.param)
    return request.param


def test_coverage_by_hand(all_rows):
    # Gains at first are the column sums: 2.4, 2.0, 1.8, 1. After 0 is chosen, m = (1, 0.8, 0.6, 0): patch 1 adds
    # 1 - 0.8, patch 2 adds 1 - 0.6, patch 3 still 1.
    coverage = Coverage(HAND)
    torch.testing.assert_close(coverage.gain, torch.tensor([[2.4, 2.0, 1.8, 1.0]]).double())
    coverage.add(torch.tensor([0]))
    torch.testing.assert_close(coverage.gain, torch.tensor([[0.0, 0.2, 0.4, 1.0]]).double())
    coverage.add(torch.tensor([2]))  # m = (1, 0.8, 1, 0)
    torch.testing.assert_close(coverage.gain, torch.tensor([[0.0, 0.2, 0.0, 1.0]]).double())


def test_scope_by_hand():
    # Unweighted: 0 (2.4), 3 (1), 2 (0.4), 1. If patch 1 weighs 1.5: 3.0 beats 2.4; then m = (0.8, 1, 0.2, 0), so patch 0
    # adds 0.2 + 0.4, patch 2 adds 0.8 and patch 3 adds 1: 3, 2; then m = (0.8, 1, 1, 1) and 0 is left.
    real = torch.ones(1, 4, dtype=torch.bool)
    assert cover_greedily(HAND, torch.ones(1, 4), real, 4).tolist() == [[0, 3, 2, 1]]
    assert cover_greedily(HAND, torch.tensor([[1, 1.5, 1, 1]]), real, 4).tolist() == [[1, 3, 2, 0]]


def naive_facility_location(similarity, weight, count):
    covered, picks = np.zeros(len(similarity)), []
    while len(picks) < count:
        # Rounded: two patches that would cover nothing but each other and themselves add the same, and the first is taken.
        gain = np.maximum(similarity - covered[:, None], 0).sum(0).round(12)
        rest = [i for i in range(len(similarity)) if i not in picks]
        picks.append(max(rest, key=lambda i: gain[i] * weight[i]))
        covered = np.maximum(covered, similarity[:, picks[-1]])
    return picks


@pytest.mark.parametrize("alpha", [0, 1, 2.5])
@pytest.mark.parametrize("grid, layout", SETTINGS, ids=str)
def test_scope_equals_the_naive_rule(grid, layout, alpha):
    image = make_image(grid, **layout)
    members = tile_members(image)
    for budget in (5, 58):
        expected = []
        for tile, count in zip(members, split_evenly(budget, [len(tile) for tile in members]), strict=True):
            states = torch.stack([hidden_of(image, i, image.tower.hidden) for i in tile])
            similarity = cosine_matrix(states).double().numpy()
            np.testing.assert_allclose(similarity, numpy_cosines(states), rtol=0, atol=1e-6)
            weight = image.saliency[tile].double().numpy() ** alpha
            expected += [tile[i] for i in naive_facility_location(similarity, weight, count)]
        assert select("scope", image, make_text(), budget, alpha=alpha).indices.tolist() == sorted(expected)


def test_gains_are_those_of_recomputing(all_rows, monkeypatch):
    # In small parts, so that several tiles and parts of a tile meet in one; clusters, so that much changes at once.
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 20, generator=draw)
    vectors = centres[torch.randint(6, (3, 50), generator=draw)] + 0.4 * torch.randn(3, 50, 20, generator=draw)
    vectors[1, 40:] = 0  # padding
    similarity = cosine_matrix(vectors)
    assert torch.equal(similarity, similarity.mT)
    for block in (1, 50 * 7, 1 << 18):
        monkeypatch.setattr("llava.methods.before_llm.coverage.BLOCK", block)
        coverage = Coverage(similarity)
        covered = torch.zeros(3, 50)
        for _ in range(30):
            chosen = torch.randint(40, (3,), generator=draw)
            coverage.add(chosen)
            covered = torch.maximum(covered, similarity[torch.arange(3), chosen])
            gain = (similarity.double() - covered[:, :, None].double()).clamp_min(0).sum(1)
            torch.testing.assert_close(coverage.gain, gain, rtol=0, atol=1e-13)


@pytest.mark.parametrize("steps", [2, 16, 1024])
def test_all_rows_give_the_picks_of_changed_rows(steps, monkeypatch):
    """Bit for bit where sums are exact, ties included: similarities and weights are multiples of 1 / steps."""
    draw = torch.Generator().manual_seed(steps)
    similarity = (cosine_matrix(torch.randn(4, 60, 5, generator=draw)) * steps).round() / steps
    weight = torch.randint(1, 4, (4, 60), generator=draw).double()
    real = torch.arange(60) < torch.tensor([60, 60, 41, 9])[:, None]
    similarity = similarity * real[:, None] * real[..., None]
    found = []
    for everywhere in (False, True):
        monkeypatch.setattr(Coverage, "all_rows", everywhere)
        found.append(cover_greedily(similarity, weight, real, 60))
    assert torch.equal(*found)
    for tile, count in enumerate([60, 60, 41, 9]):
        expected = naive_facility_location(similarity[tile].double().numpy(), weight[tile].numpy(), count)
        assert found[1][tile, :count].tolist() == expected


def test_all_rows_ask_the_device_nothing(monkeypatch):
    """nonzero is what a GPU would have to be waited for."""
    similarity, real = cosine_matrix(torch.randn(2, 30, 8)), torch.ones(2, 30, dtype=torch.bool)
    weight = torch.ones(2, 30)

    def asked(*args):
        raise AssertionError("asked which rows changed")

    monkeypatch.setattr(torch, "nonzero", asked)
    with pytest.raises(AssertionError, match="which rows changed"):
        cover_greedily(similarity, weight, real, 3)
    monkeypatch.setattr(Coverage, "all_rows", True)
    cover_greedily(similarity, weight, real, 3)


# --- VisionZip -------------------------------------------------------------------------------------------------------


def nine_patches():
    """One tile of 3 x 3: the state of a patch is its number (10 for [CLS]), the projector doubles it, keys point
    along two axes."""
    towards = [0, 0, 1, 1, 0, 0, 1, 0, 0]  # axis of each patch's key
    hidden = torch.tensor([[[10.0], *[[float(i)] for i in range(9)]]])
    keys = torch.zeros(1, 10, 2)
    keys[0, range(1, 10), towards] = torch.arange(1.0, 10)
    saliency = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.5, 0.1, 0.1, 0.4, 0.1])
    number = torch.arange(9)
    tower = TowerStates(lambda states: 2 * states, hidden, keys)
    return ImageTokens(2 * hidden[0, 1:], saliency, torch.zeros_like(number), number // 3, number % 3, tower=tower)


def test_visionzip_by_hand():
    # Dominant: [CLS] and patches 4, 7. The others are 0 1 2 3 5 6 8, every third is a target: 0 and 3 (6 would be the
    # third). 1, 5, 8 point as 0 does, 2 and 6 as 3 does. Tokens: 0 + (1 + 5 + 8) / 3 and 3 + (2 + 6) / 2, times 2.
    kept = select("visionzip", nine_patches(), make_text(), 1, dominant=3, contextual=2)
    assert kept.indices.tolist() == [-1, 4, 7, -1, -1]
    assert kept.sources == [[], [0, 1, 5, 8], [2, 3, 6]]
    torch.testing.assert_close(kept.features.flatten(), torch.tensor([20.0, 8, 14, 28 / 3, 14]))
    # No contextual tokens: the others are gone. Only [CLS]: nothing is dominant beside it.
    kept = select("visionzip", nine_patches(), make_text(), 1, dominant=2, contextual=0)
    assert kept.indices.tolist() == [-1, 4] and kept.sources == [[]]
    kept = select("visionzip", nine_patches(), make_text(), 1)
    assert kept.indices.tolist() == [-1] and kept.features.tolist() == [[20.0]]


@pytest.mark.parametrize("dominant, contextual, warns", [(8, 2, True), (600, 0, True), (7, 2, False), (3, 2, False)])
def test_visionzip_counts_above_a_tile_are_a_warning(dominant, contextual, warns):
    """Every token is kept then, as for any budget that is large enough."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kept = select("visionzip", nine_patches(), make_text(), 1, dominant=dominant, contextual=contextual)
    texts = {str(one.message) for one in said}
    expected = f"ask for {dominant + contextual} tokens per tile, but a tile has 9 patches"
    assert [expected in text for text in texts] == ([True] if warns else [])
    assert len(kept.indices) == min(9, dominant + contextual)


def test_merging_by_hand():
    # Five patches, three targets: 0, 1, 2 (every 5 // 3 = first). 3 is between 0 and 1: the first; 4 is like 2. Nobody
    # joins 1, which stays as it is.
    keys = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 9]])
    hidden = torch.tensor([[1.0], [2], [4], [8], [16]])
    tokens, group = merge_alike(hidden, keys, 3)
    assert tokens.flatten().tolist() == [9, 2, 20] and group.tolist() == [0, 1, 2, 0, 2]


def naive_visionzip(image, budget, ratio=(54, 10)):
    """(indices, made states, sources) in the order of the LLM, tile by tile with plain loops."""
    members, hidden, keys = tile_members(image), image.tower.hidden, image.tower.keys
    tiles = []
    for tile, quota in zip(members, split_evenly(budget, [len(tile) for tile in members]), strict=True):
        if not quota:
            continue
        contextual = quota * ratio[1] // sum(ratio)
        by_saliency = sorted(tile, key=lambda i: -float(image.saliency[i]))
        dominant = sorted(by_saliency[: quota - contextual - 1])
        others = [i for i in tile if i not in dominant]
        targets = others[:: max(1, len(others) // contextual)][:contextual] if contextual else []
        groups = {target: [] for target in targets}
        for i in others if contextual else []:
            if i not in groups:
                cosine = [
                    torch.cosine_similarity(hidden_of(image, i, keys), hidden_of(image, t, keys), dim=0)
                    for t in targets
                ]
                groups[targets[int(np.argmax(cosine))]].append(i)
        made = []
        for target, joined in groups.items():
            mean = sum(hidden_of(image, i, hidden) for i in joined) / max(1, len(joined))
            made.append(hidden_of(image, target, hidden) + mean)
        number = int(image.tile[tile[0]])
        tiles.append((dominant, hidden[number, 0], made, [sorted([t, *joined]) for t, joined in groups.items()]))
    (dominant, cls, made, sources), *crops = tiles
    indices = [-1, *dominant, *[-1] * len(made)]
    states, sources = [cls, *made], [[], *sources]
    indices += sorted(i for crop in crops for i in crop[0])
    for crop in crops:
        indices, states, sources = [*indices, -1], [*states, crop[1]], [*sources, []]
    for crop in crops:
        indices, states, sources = [*indices, *[-1] * len(crop[2])], [*states, *crop[2]], [*sources, *crop[3]]
    return indices, torch.stack(states), sources


@pytest.mark.parametrize("grid, layout", SETTINGS, ids=str)
@pytest.mark.parametrize("budget", [1, 3, 29, 60])
def test_visionzip_equals_the_naive_rule(grid, layout, budget):
    image = make_image(grid, seed=budget, **layout)
    kept = select("visionzip", image, make_text(), budget)
    indices, states, sources = naive_visionzip(image, budget)
    assert kept.indices.tolist() == indices and kept.sources == sources
    torch.testing.assert_close(kept.features[kept.indices < 0], image.tower.project(states), rtol=1e-4, atol=1e-4)


def test_published_counts_stand_in_place_of_the_budget():
    image = make_image((2, 2), cut=0)  # 5 tiles of 169 patches
    kept = select("visionzip", image, make_text(), 7, dominant=9, contextual=4)
    assert len(kept.indices) == 5 * 13 and int((kept.indices < 0).sum()) == 5 * 5
    assert torch.bincount(kept.tile[kept.tile >= 0]).tolist() == [8] * 5
    # More than there is: everything, as with any budget.
    kept = select("visionzip", image, make_text(), 7, dominant=160, contextual=9)
    assert len(kept.indices) == len(image.tile)
    # A crop of which unpadding has left 7 patches: what it lacks goes to the other tiles.
    image = make_image((1, 2), side=7, cut=3)  # 49, 7 and 7 patches
    kept = select("visionzip", image, make_text(), 7, dominant=6, contextual=4)
    assert len(kept.indices) == 30
    assert torch.bincount(kept.tile[kept.tile >= 0]).tolist() == [
        16 - 16 * 4 // 10 - 1,
        7 - 7 * 4 // 10 - 1,
        7 - 7 * 4 // 10 - 1,
    ]


# --- AdaV with coverage ----------------------------------------------------------------------------------------------


def test_covering_union_by_hand():
    # Similarity as in HAND, strength 1. By text (1, 0.9, 0.5, 0.1), two picks: 0; then gains are 0, 0.2, 0.4, 1 of 2.4,
    # 2.0, 1.8, 1: values 0, 0.09, 0.111, 0.1: patch 2, where AdaV would take 1. By saliency (0.5, 0.6, 0.2, 0.1), one
    # pick: 1 is left 0.2 of 2.0, 0.06; 3 is left all, 0.1: patch 3.
    scores = torch.tensor([[[1, 0.9, 0.5, 0.1], [0.5, 0.6, 0.2, 0.1]]])

    def cover(by_text, by_saliency, strength):
        counts = torch.tensor([by_text, by_text + by_saliency])[:, None]
        real = torch.ones(1, 4, dtype=torch.bool)
        return torch.nonzero(covering_union(HAND, real, scores, *counts, by_text + by_saliency, strength)[0]).flatten().tolist()

    assert cover(2, 0, 1) == [0, 2]
    assert cover(2, 1, 1) == [0, 2, 3]
    # Without a diminishing return: 0, 1 by text, 1 again by saliency; short of one, so the next by text (0.5 / 1.9)
    # against the next by saliency that is unused (0.2 / 0.6): patch 2 either way.
    assert cover(2, 1, 0) == [0, 1, 2]


def test_strength_zero_is_adav():
    overlapping = 0
    for seed in range(60):
        draw = np.random.default_rng(seed)
        image = make_image([None, (2, 2), (3, 1)][seed % 3], seed=seed, side=5, cut=1)
        text, budget = make_text(4, seed=seed), int(draw.integers(1, len(image.patches)))
        options = {"min_share": float(draw.choice([0, 0.25, 0.5])), "temperature": float(draw.choice([0.01, 0.2]))}
        adav = select("adav", image, text, budget, **options)
        ours = select("adav_cover", image, text, budget, strength=0, **options)
        assert torch.equal(ours.indices, adav.indices), f"seed {seed}"
        assert ours.report["k_text"] == adav.report["k_text"]
        t, a = (adav.report[name][image.patches] for name in ("text_score", "saliency_score"))
        plain = (
            union_of_best(t, adav.report["k_text"], a, 0).tolist()
            + union_of_best(t, 0, a, adav.report["k_saliency"]).tolist()
        )
        overlapping += len(set(plain)) < budget
    assert overlapping > 20, "the fill is tested"


def naive_cover(similarity, lists, strength):
    """Greedy over [(scores, count), ...], every gain recomputed; for lists that do not overlap."""
    similarity = np.maximum(similarity, 0)
    covered, picks, full = np.zeros(len(similarity)), [], similarity.sum(0)
    for scores, count in lists:
        for _ in range(count):
            gain = np.maximum(similarity - covered[:, None], 0).sum(0)
            rest = [i for i in range(len(similarity)) if i not in picks]
            picks.append(max(rest, key=lambda i: scores[i] * (gain[i] / full[i]) ** strength))
            covered = np.maximum(covered, similarity[:, picks[-1]])
    return picks


@pytest.mark.parametrize("strength", [0.3, 1, 2])
@pytest.mark.parametrize("grid, layout", SETTINGS, ids=str)
def test_adav_cover_equals_the_naive_rule(grid, layout, strength):
    image, text = make_image(grid, **layout), make_text()
    patches = image.patches
    similarity = numpy_cosines(image.features[patches])
    for budget, words in ((7, text), (58, text), (29, text[:0])):
        kept = select("adav_cover", image, words, budget, strength=strength, temperature=0.2)
        t, a = (kept.report[name][patches].double().numpy() for name in ("text_score", "saliency_score"))
        k_text, k_saliency = kept.report["k_text"], kept.report["k_saliency"]
        if len(words):
            adav = select("adav", image, words, budget, temperature=0.2).report
            assert (k_text, k_saliency) == (adav["k_text"], adav["k_saliency"]) and 0 < k_text < budget
        else:
            assert (k_text, k_saliency) == (0, budget)
        expected = naive_cover(similarity, [(t, k_text), (a, k_saliency)], strength)
        assert kept.indices.tolist() == patches[expected].sort().values.tolist()


def test_coverage_spreads_the_choice():
    # Nine tenths of the patches are near copies of each other and the most salient: AdaV keeps those, coverage does not.
    image = make_image()
    alike = torch.rand(len(image.tile), generator=torch.Generator().manual_seed(0)) < 0.9
    image.features[alike] = image.features[0] + 0.01 * image.features[alike]
    image.saliency[alike] += 0.02
    plain, ours = (select(name, image, make_text(0), 29).indices for name in ("adav", "adav_cover"))
    assert alike[plain].all() and int(alike[ours].sum()) < 15


# --- tiles, options, what is missing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("grid, layout", SETTINGS, ids=str)
def test_members_of_tiles(grid, layout):
    image = make_image(grid, **layout)
    members, real, sizes = members_of_tiles(image)
    assert sizes == real.sum(dim=1).tolist()
    assert [image.patches[row[ok]].tolist() for row, ok in zip(members, real, strict=True)] == tile_members(image)


@pytest.mark.parametrize(
    "name, states",
    [
        ("visionzip", ["hidden", "keys"]),
        *((name, ["hidden"]) for name in ("scope", "apet", "mmtok", "vispruner", "prunesid")),
        ("cdpruner", ["text_cosine"]),
        ("hiprune", ["received"]),
    ],
)
def test_missing_tower_states_are_a_sentence(name, states):
    image = make_image()
    options = {"text_tower": "a CLIP"} if name == "cdpruner" else {}
    for missing in states:
        image = make_image()
        setattr(image.tower, missing, None)
        with pytest.raises(UserError, match=f"'{name}' reads {missing} of"):
            select(name, image, make_text(), 7, **options)
    image.tower = None
    with pytest.raises(UserError, match=" and ".join(states)):
        select(name, image, make_text(), 7, **options)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("visionzip", {"dominant": 54}, ["contextual", "None", "dominant"]),
        ("visionzip", {"contextual": 10}, ["contextual", "10", "dominant"]),
        ("visionzip", {"dominant": 0, "contextual": 1}, ["dominant", "0", "at least 1"]),
        ("visionzip", {"dominant": 2, "contextual": 1.5}, ["contextual", "1.5", "whole number"]),
        ("cdpruner", {"relevance": "cosine"}, ["relevance", "'cosine'", '"clip"', '"embeddings"']),
        ("cdpruner", {"relevance": "clip"}, ["text_tower", "None", "CLIP"]),
        ("cdpruner", {"theta": 1}, ["theta", "1", "below 1"]),
        ("scope", {"alpha": -1}, ["alpha", "-1", "at least 0"]),
        ("scope", {"alpha": math.nan}, ["alpha", "nan"]),
        ("adav_cover", {"strength": "1"}, ["strength", "'1'"]),
        ("adav_cover", {"min_share": 0.6}, ["min_share", "0.6"]),
        ("adav_cover", {"temperature": 0}, ["temperature", "0"]),
        ("divprune", {"alpha": 1}, ["'alpha'", "it has none"]),
        ("mmtok", {"compat": "public"}, ["'compat'", "it has none"]),
        ("vispruner", {"salient_share": 1.5}, ["salient_share", "1.5", "0 to 1"]),
        ("holov", {"compat": "publik"}, ["compat", "'publik'", '"public"']),
        ("prunesid", {"compat": True}, ["compat", "True", '"public"']),
    ],
)
def test_bad_options_are_sentences(name, options, words):
    with pytest.raises(UserError) as error:
        select(name, make_image(), make_text(), 7, **options)
    for word in words:
        assert word in str(error.value)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [5, 58, 400])
@pytest.mark.parametrize("name", SELECTORS)
def test_a_batch_chooses_as_each_image_alone(name, budget):
    images = [make_image(grid, seed=seed, **layout) for seed, (grid, layout) in enumerate(SETTINGS)]
    texts = [make_text(words, seed=9 + words) for words in (3, 0, 1, 7, 5)]
    for image, text, kept in zip(images, texts, select_all(name, images, texts, budget), strict=True):
        alone = select(name, image, text, budget)
        assert torch.equal(kept.indices, alone.indices) and torch.equal(kept.features, alone.features)
        assert kept.report.keys() == alone.report.keys() and kept.sources == alone.sources


@pytest.mark.parametrize("name", SELECTORS)
def test_methods_that_do_not_read_the_question(name):
    """reads_text and reads_key tell whether the choice changes with the question or with the sample."""
    images = [make_image((2, 2), key=key) for key in (1, 2)]
    first, second = (select(name, image, make_text(seed=image.key), 29) for image in images)
    assert torch.equal(first.indices, second.indices) != (SELECTORS[name].reads_text or SELECTORS[name].reads_key)


@pytest.mark.parametrize("name", ["divprune", "cdpruner", "scope", "mmtok", "vispruner", "prunesid", "adav_cover"])
def test_images_of_a_batch_choose_together(name, monkeypatch):
    """The rule runs once for the whole batch, or once for each part of it that fits into memory."""
    rule, runs = SELECTORS[name].rule, []
    monkeypatch.setattr(
        SELECTORS[name], "rule", lambda self, s, *a, **k: runs.append(s.shape[0]) or rule(self, s, *a, **k)
    )
    images = [make_image(grid, seed=seed, **layout) for seed, (grid, layout) in enumerate(SETTINGS)]
    whole = select_all(name, images, [make_text()] * 5, 29)
    assert len(runs) == 1
    monkeypatch.setattr(greedy, "ENTRIES", 1)
    parts = select_all(name, images, [make_text()] * 5, 29)
    assert len(runs) == 6 and runs[0] == sum(runs[1:])
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(whole, parts, strict=True))
