"""ApET: recorded tokens of the authors' code, cases worked by hand, and a naive reference."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from apet_reference import naive_apet, one_tile
from image_tokens import SETTINGS, make_image, make_text

from llava.common.errors import UserError
from llava.methods.before_llm import select
from llava.methods.before_llm.apet import approximation_errors, basis_size, farthest_states

RECORDED = np.load(Path(__file__).parents[1] / "data/apet_choices.npz")
NO_TEXT = torch.ones(1, 4)


@pytest.mark.parametrize("case, count", [(1, 64), (2, 128), (3, 192)])
def test_recorded_tokens(case, count):
    image, start = one_tile(torch.tensor(RECORDED[f"{case}_hidden"][1:])), int(RECORDED[f"{case}_apet_start"])
    kept = select("apet", image, NO_TEXT, count, compat="public", start=start)
    tokens = torch.tensor(RECORDED[f"{case}_apet_{count}_tokens"])
    torch.testing.assert_close(kept.features, tokens, rtol=0, atol=1e-5)
    # The places: ten of them have basis patches, and no other patch of theirs is in any token.
    places = RECORDED[f"{case}_apet_{count}"].tolist()
    basis = kept.indices[kept.indices >= 0].tolist()
    lost = set(range(576)) - {patch for members in kept.sources for patch in members} - set(basis)
    assert len(basis) == 10 and start in basis and lost < set(places) and basis != sorted(basis)
    # Ours: the same basis in its own places, and no patch is lost.
    ours = select("apet", image, NO_TEXT, count, start=start)
    assert ours.indices[ours.indices >= 0].tolist() == sorted(basis)
    assert sorted([*basis, *(patch for members in ours.sources for patch in members)]) == list(range(576))


def test_basis_sizes_by_hand():
    assert [basis_size(quota) for quota in (1, 2, 3, 7, 19, 20, 21, 192)] == [1, 1, 1, 3, 9, 10, 10, 10]


def test_farthest_states_by_hand():
    # On a line at 0, 1, 5, 9, from 1: 9 is 8 away; then 5 is 4 from both, 0 only 1; then 0.
    states = torch.tensor([[0.0], [1], [5], [9]])
    assert farthest_states(states, 4, torch.tensor([1])).tolist() == [1, 3, 2, 0]
    assert farthest_states(states * 0, 4, torch.tensor([2])).tolist() == [2, 0, 1, 3], "equal states: each once"


def test_errors_by_hand():
    # The basis spans the first axis: what is left of a state is its second part. Of a basis state, the ridge leaves
    # 1e-5 / (4 + 1e-5) of its length 2.
    errors = approximation_errors(torch.tensor([[3.0, 4], [5, 0], [0, -7], [2, 0]]), torch.tensor([[2.0, 0]]))
    torch.testing.assert_close(errors, torch.tensor([4.0, 5e-5 / 4, 7, 2e-5 / 4]).double(), rtol=1e-4, atol=0)
    # A basis of equal states spans as much.
    twice = approximation_errors(torch.tensor([[3.0, 4], [0, -7]]), torch.tensor([[2.0, 0], [2, 0]]))
    torch.testing.assert_close(twice, torch.tensor([4.0, 7]).double(), rtol=1e-4, atol=0)


def test_by_hand():
    # 3 x 3 patches, K = 3: one basis patch, two that absorb. Number 0 is farthest from the mean and spans the first
    # axis. Largest second parts: 5 (6) and 2 (4). Of the others 1 (0.9, 3) and 4 (0, 2) point as 5 does, or as 2 does:
    # cosines with 5 = (0, 6) are 0.958 and 1; with 2 = (4, 4) 0.880 and 0.707: both go to 5. 3, 6, 7, 8 = (x, 0): 2.
    states = torch.tensor([[9.0, 0], [0.9, 3], [4, 4], [1, 0], [0, 2], [0, 6], [2, 0], [3, 0], [2, 0]])
    kept = select("apet", one_tile(states), NO_TEXT, 3)
    assert kept.indices.tolist() == [0, -1, -1] and kept.sources == [[2, 3, 6, 7, 8], [1, 4, 5]]
    torch.testing.assert_close(kept.features, torch.tensor([[9.0, 0], [12 / 5, 4 / 5], [0.3, 11 / 3]]))
    # In the authors' code the third largest error is patch 1 (3): it is lost, and patch 0 stands in its place. It is
    # absorbed as well, by 2.
    kept = select("apet", one_tile(states), NO_TEXT, 3, compat="public")
    assert kept.indices.tolist() == [0, -1, -1] and kept.sources == [[0, 2, 3, 6, 7, 8], [4, 5]]
    torch.testing.assert_close(kept.features, torch.tensor([[9.0, 0], [21 / 6, 4 / 6], [0, 4]]))
    # One token: the basis alone. Two: one of each. From patch 4, which spans the second axis, 0 has the largest error.
    assert select("apet", one_tile(states), NO_TEXT, 1).indices.tolist() == [0]
    kept = select("apet", one_tile(states), NO_TEXT, 2, start=4)
    assert kept.indices.tolist() == [-1, 4] and kept.sources == [[0, 1, 2, 3, 5, 6, 7, 8]]


@pytest.mark.parametrize("grid, layout", SETTINGS, ids=str)
@pytest.mark.parametrize("budget", [1, 7, 29, 60])
def test_equals_the_naive_rule(grid, layout, budget):
    image = make_image(grid, seed=budget, **layout)
    kept = select("apet", image, make_text(), budget)
    indices, states, sources = naive_apet(image, budget)
    assert kept.indices.tolist() == indices and kept.sources == sources
    if states:
        made = image.tower.project(torch.tensor(np.stack(states)).float())
        torch.testing.assert_close(kept.features[kept.indices < 0], made, rtol=1e-4, atol=1e-4)


def test_broken_states_spoil_no_token():
    image = make_image((2, 1))
    image.tower.hidden[:, ::3] = math.nan
    image.features = torch.zeros_like(image.features)
    assert select("apet", image, make_text(), 58).features.isfinite().all()


@pytest.mark.parametrize(
    "value, words",
    [(-1, "a whole number of at least 0"), (1.0, "whole number"), (36, "is 36, but a tile has 36 patches")],
)
def test_a_bad_start_is_a_sentence(value, words):
    with pytest.raises(UserError, match=words):
        select("apet", make_image(None, side=6), make_text(), 7, start=value)
