"""Choices of AngelSlim, Tencent's code for Qwen2.5-VL, on random features beside those of this package.

tests/data/angelslim_choices.npz was recorded with commit 67394ce of https://github.com/Tencent/AngelSlim. Each case is
one prompt with N merged vision tokens; cases 1 to 3 have one image, case 4 has two.
  n_grid [I, 3]                   patches of each image in time, height and width
  n_query, n_key [H, S, d]        of the S patches of all images in the tower's last block (case 4 alone)
  n_saliency [N]                  attention that each token receives
  n_features [N, D]               tokens behind the merger
  n_merged_keys [N, d]            keys of the tower, mean over heads and merged patches
  n_METHOD [K]                    tokens that the code keeps, ascending; of visionzip: dominant and target tokens
  n_visionzip_groups [N]          number of the kept token that each token is merged into
docs/transformers.md lists where the two agree.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llava.integrations.transformers.received_attention import QwenSaliency
from llava.methods.before_llm import ImageTokens, select
from llava.methods.before_llm.scope import cover_greedily
from llava.methods.before_llm.similarity import cosine_matrix
from llava.methods.before_llm.visionzip import merge_alike
from llava.methods.before_llm.vispruner import list_lengths, thinned
from llava.methods.ranking import lowest_index_topk

RECORDED = dict(np.load(Path(__file__).parents[1] / "data/angelslim_choices.npz"))
ONE_IMAGE = (1, 2, 3)


def recorded(case, name):
    return torch.tensor(RECORDED[f"{case}_{name}"])


class Attention(torch.nn.Module):
    """The attention of a tower's block, for recorded queries and keys."""

    num_heads, scaling = 2, 8**-0.5

    def qkv(self, hidden):
        query, key = (recorded(4, name).transpose(0, 1) for name in ("query", "key"))
        return torch.stack([query, key, key], dim=1).flatten(1)

    def forward(self, hidden, **_):
        return hidden


def test_saliency_is_the_same_up_to_a_factor():
    """AngelSlim sums over queries and merged patches, so its values are S x 4 times the mean of an image of S patches."""
    grid, attention = recorded(4, "grid"), Attention()
    tower = SimpleNamespace(
        blocks=[SimpleNamespace(attn=attention)], spatial_merge_size=2, window_size=112, patch_size=14
    )
    patches = grid.prod(dim=1)
    one = torch.ones(int(patches.sum()), 8)
    ends = torch.cat([patches.new_zeros(1), patches.cumsum(0)])
    with QwenSaliency(tower) as saliency:
        attention(one, cu_seqlens=ends, position_embeddings=(one, one * 0))
    found = torch.cat([own * 4 * count for own, count in zip(saliency.of(grid), patches, strict=True)])
    assert torch.allclose(found, recorded(4, "saliency"), rtol=1e-4)


@pytest.mark.parametrize("case", ONE_IMAGE)
def test_divprune(case):
    features, kept = recorded(case, "features"), recorded(case, "divprune")
    _, height, width = (recorded(case, "grid")[0] // torch.tensor([1, 2, 2])).tolist()
    place = torch.arange(height * width)
    image = ImageTokens(features, recorded(case, "saliency"), place * 0, place // width, place % width)
    assert select("divprune", image, features[:0], len(kept)).indices.tolist() == kept.tolist()


@pytest.mark.parametrize("case", (*ONE_IMAGE, 4))
def test_scope(case):
    """The same rule, on the same inputs; case 4: AngelSlim chooses from the tokens of all images together."""
    features, kept = recorded(case, "features"), recorded(case, "scope")
    similarity, weight = cosine_matrix(features)[None], recorded(case, "saliency")[None]
    picks = cover_greedily(similarity, weight, torch.ones_like(weight, dtype=torch.bool), len(kept))
    assert picks[0].sort().values.tolist() == kept.tolist()


@pytest.mark.parametrize("case", ONE_IMAGE)
def test_vispruner_differs_in_the_order_of_its_list(case):
    """AngelSlim puts the list of remaining tokens into raster order before each round. Ours is the authors' order.

    A round also drops at most half of a short list, there rounded down, here rounded up.
    """
    features, saliency, kept = (recorded(case, name) for name in ("features", "saliency", "vispruner"))
    salient = len(kept) // 2
    similarity, order = cosine_matrix(features)[None], lowest_index_topk(saliency, len(saliency))
    wanted, listed = len(kept) - salient, order[None, salient:]
    length = listed.shape[1]
    lengths = list_lengths(length, wanted)
    ours = thinned(similarity, listed, torch.tensor([length]), torch.tensor([wanted]), lengths)[:, :wanted]
    theirs = listed.sort(dim=1).values
    while length > wanted:
        left = length - min(8, length // 2, length - wanted)
        theirs = thinned(similarity, theirs, torch.tensor([length]), torch.tensor([left]), [length])[:, :left]
        theirs, length = theirs.sort(dim=1).values, left
    assert set(theirs[0].tolist()) | set(order[:salient].tolist()) == set(kept.tolist())
    assert set(ours[0].tolist()) | set(order[:salient].tolist()) != set(kept.tolist())


@pytest.mark.parametrize("case", ONE_IMAGE)
def test_visionzip(case):
    """The same dominant tokens, targets and groups. A merged token is a mean there, and target plus mean here."""
    saliency, keys, kept = (recorded(case, name) for name in ("saliency", "merged_keys", "visionzip"))
    count = round(len(kept) * 10 / 64)
    dominant = lowest_index_topk(saliency, len(kept) - count)
    others = torch.ones_like(saliency, dtype=torch.bool).index_fill(0, dominant, False).nonzero()[:, 0]
    _, group = merge_alike(recorded(case, "features")[others], keys[others], count)
    targets = others[torch.arange(count) * (len(others) // count)]
    assert torch.cat([dominant, targets]).sort().values.tolist() == kept.tolist()
    assert torch.equal(kept[recorded(case, "visionzip_groups")[others].long()].long(), targets[group])
