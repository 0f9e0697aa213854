"""HoloV: recorded choices of the authors' code, cases worked by hand, and a naive reference."""

import numpy as np
import pytest
import torch
from image_tokens import flat_image, make_image, make_text
from recorded_choices import CASES, recorded, recorded_tile

from llava.config import AdaVConfig
from llava.methods.before_llm import select, select_all
from llava.methods.before_llm.holov import chunks_of, first_shares, quotas


def shares(function, weight, *numbers):
    return function(torch.tensor([weight]).double(), *(torch.tensor([n]) for n in numbers))[0].tolist()


@pytest.mark.parametrize(
    "variant, input", [("", {}), ("_first570", {"count": 570}), ("_peaked", {"saliency": "peaked"})]
)
@pytest.mark.parametrize("case, budget", CASES)
def test_recorded_choices(case, budget, variant, input):
    image, expected = recorded_tile(case, **input), recorded(f"{case}_holov_{budget}{variant}")
    kept = select("holov", image, make_text(0), budget, compat="public")
    assert kept.indices.tolist() == expected.tolist()
    zeros = kept.indices < 0
    assert int(zeros.sum()) == len(kept.sources) == {"2_peaked": 22, "3_peaked": 36}.get(f"{case}{variant}", 0)
    assert not kept.features[zeros].any() and torch.equal(kept.features[~zeros], image.features[kept.indices[~zeros]])
    # Ours keeps the same patches in LLM order, and others in the place of zero vectors.
    ours = select("holov", image, make_text(0), budget).indices.tolist()
    assert len(ours) == budget and set(expected[expected >= 0].tolist()) <= set(ours) and ours == sorted(set(ours))


def test_shares_by_hand():
    # 10 tokens over weights 5, 3, 2, 0: 5, 3, 2, 0 exactly. 11 tokens: 5.5, 3.3, 2.2: one is left, for the largest weight.
    # 9 tokens: 4.5, 2.7, 1.8: 4 + 2 + 1 = 7, so the two largest get one more.
    assert shares(first_shares, [5, 3, 2, 0], [10]) == [5, 3, 2, 0]
    assert shares(first_shares, [5, 3, 2, 0], [11]) == [6, 3, 2, 0]
    assert shares(first_shares, [5, 3, 2, 0], [9]) == [5, 3, 1, 0]
    # Equal weights, or none: the first chunks get what is left.
    assert shares(first_shares, [2, 2, 2, 2], [6]) == shares(first_shares, [0, 0, 0, 0], [6]) == [2, 2, 1, 1]


def test_surplus_by_hand():
    # 12 tokens over weights 8, 2, 1, 1 with 4 patches each: 8, 2, 1, 1. The first is full at 4. Its surplus of 4 goes to
    # 2 : 1 : 1, which is 2, 1, 1: 4, 4, 2, 2.
    assert shares(quotas, [8, 2, 1, 1], [4, 4, 4, 4], [12]) == [4, 4, 2, 2]
    # 14: 9.33, 2.33, 1.17, 1.17: 9 + 2 + 1 + 1, and one for the first: 10. Six are left: 3, 1.5, 1.5: 3, 1, 1 and one for
    # the second, 2 + 4, which is full at 4: two are left for the others, one each.
    assert shares(quotas, [8, 2, 1, 1], [4, 4, 4, 4], [14]) == [4, 4, 3, 3]
    # Chunks without weight take what is left, too.
    assert shares(quotas, [1, 0, 0, 0], [4, 4, 4, 4], [10]) == [4, 2, 2, 2]
    assert shares(quotas, [0, 1, 0, 0], [4, 4, 4, 4], [16]) == [4, 4, 4, 4]


def test_chunks_by_hand():
    # 34 patches: two chunks of 3, then 14 of 2. Three patches: three chunks of 1.
    members, real = chunks_of(34)
    assert [row[ok].tolist() for row, ok in zip(members, real, strict=True)][:4] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7],
        [8, 9],
    ]
    assert members[real].tolist() == list(range(34)) and members.shape == (16, 3)
    members, real = chunks_of(3)
    assert real.sum(dim=1).tolist() == [1, 1, 1, *[0] * 13]


def test_holov_by_hand():
    # 32 patches in 16 chunks of 2. Chunk 0 has means of 8, chunk 5 of 4, the others 0; 3 tokens: 2 and 1. Chunk 5 keeps the
    # more salient patch, 11.
    saliency = torch.zeros(32)
    saliency[[0, 1, 10, 11]] = torch.tensor([9.0, 7, 3, 5])
    image = flat_image(torch.arange(32.0)[:, None], saliency)
    assert select("holov", image, make_text(0), 3).indices.tolist() == [0, 1, 11]
    # 6 tokens: 4 and 2 of 2 patches each. The surplus of 2 goes to chunks without saliency, to the first two of them.
    assert select("holov", image, make_text(0), 6).indices.tolist() == [0, 1, 2, 4, 10, 11]
    public = select("holov", image, make_text(0), 6, compat="public")
    assert public.indices.tolist() == [0, 1, 10, 11, -1, -1] and public.features.flatten().tolist() == [
        0,
        1,
        10,
        11,
        0,
        0,
    ]
    # In the public order, a chunk that is kept in part goes by saliency.
    assert select("holov", image, make_text(0), 3, compat="public").indices.tolist() == [0, 1, 11]
    saliency[[0, 1]] = torch.tensor([7.0, 9])
    image = flat_image(torch.zeros(48, 1), torch.cat([saliency[:2], torch.tensor([1.0]), torch.zeros(45)]))
    assert select("holov", image, make_text(0), 2, compat="public").indices.tolist() == [1, 0]


def naive_holov(saliency, budget):
    """The rule with plain loops."""
    chunks = np.array_split(np.arange(len(saliency)), 16)
    weight = np.array([saliency[chunk].mean() if len(chunk) else 0.0 for chunk in chunks])
    quota = np.zeros(16, int)
    while quota.sum() < budget:
        free = [c for c in range(16) if quota[c] < len(chunks[c])]
        total, left = weight[free].sum(), budget - quota.sum()
        share = {c: left * (weight[c] / total if total else 1 / len(free)) for c in free}
        given = {c: int(share[c] + 1e-9) for c in free}
        for c in sorted(free, key=lambda c: -share[c])[: left - sum(given.values())]:
            given[c] += 1
        for c in free:
            quota[c] = min(quota[c] + given[c], len(chunks[c]))
    kept = [sorted(chunk, key=lambda i: -saliency[i])[:n] for chunk, n in zip(chunks, quota, strict=True)]
    return sorted(int(i) for chunk in kept for i in chunk)


@pytest.mark.parametrize("grid", [None, (1, 2), (2, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("budget", [1, 7, 58, 144])
def test_holov_equals_the_naive_rule(grid, budget):
    for seed, power in enumerate((1, 4, 12)):
        image = make_image(grid, seed=seed)
        image.saliency = image.saliency**power
        kept = select("holov", image, make_text(), budget)
        expected = naive_holov(image.saliency[image.patches].double().numpy(), budget)
        assert kept.indices.tolist() == image.patches[expected].tolist()


def test_public_keeps_its_count_in_a_batch():
    images = [make_image(grid, seed=seed) for seed, grid in enumerate([None, (2, 2), (3, 1)])]
    images[0].saliency[:5] = 1.0
    batch = select_all("holov", images, [make_text(0)] * 3, 58, compat="public")
    for image, kept in zip(images, batch, strict=True):
        alone = select("holov", image, make_text(0), 58, compat="public")
        assert torch.equal(kept.indices, alone.indices) and torch.equal(kept.features, alone.features)
        assert len(kept.indices) == 58 and len(kept.sources) == int((kept.indices < 0).sum())
    assert (batch[0].indices < 0).any()


def test_public_keeps_the_official_tiles():
    """AdaV's compat implies FasterVLM's tiles; HoloV was published with LLaVA's."""
    config = AdaVConfig(method="holov", options={"compat": "public"})
    assert config.option("anyres") == "official" and config.make_method().makes_tokens
    assert AdaVConfig(method="adav", options={"compat": "public"}).option("anyres") == "fastervlm"
    assert not AdaVConfig(method="holov").make_method().makes_tokens
