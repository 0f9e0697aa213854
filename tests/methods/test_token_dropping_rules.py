"""Schedules, the rules by hand, options and table files of the methods inside the LLM."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dropping_cases import BY_BUDGET

from llava.common.errors import UserError
from llava.config import AdaVConfig, ConfigError
from llava.methods.attention_rows import RowAttention
from llava.methods.inside_llm import make_dropper
from llava.methods.inside_llm.base import ImageSlots
from llava.methods.inside_llm.clustering import density_peaks
from llava.methods.inside_llm.dart import in_set_order, quotas
from llava.methods.inside_llm.fitprune import shares
from llava.methods.inside_llm.fitprune_tables import Table, read_tables, write_table
from llava.methods.inside_llm.plan import Cut, LayerTokens, largest_remainder, layer_mean
from llava.methods.inside_llm.sparsevlm import with_total
from llava.methods.ranking import keep_best

ROOT = Path(__file__).resolve().parents[2]

# --- schedules -------------------------------------------------------------------------------------------------------


def seen(name, n, tokens, layers=32, **options):
    """Runs of equal layers: [(layers, attention, mlp), ...]."""
    runs = []
    for layer in make_dropper(name, **options).schedule(n, tokens, layers):
        if runs and runs[-1][1:] == tuple(layer):
            runs[-1] = (runs[-1][0] + 1, *layer)
        else:
            runs.append((1, *layer))
    return runs


def test_schedule_of_fastv():
    # Layers 0 and 1 see all; the cut comes after layer 1. Means: (2 n + 30 k) / 32.
    assert seen("fastv", 576, 144) == [(2, 576, 576), (30, 144, 144)]
    assert seen("fastv", 2880, 144, layer=3) == [(3, 2880, 2880), (29, 144, 144)]
    for k, mean in ((144, 171), (58, 90.375), (29, 63.1875)):
        assert layer_mean(make_dropper("fastv").schedule(576, k, 32)) == mean


def test_schedule_of_dart():
    # One cut after layer 1, as FastV's. Public: 4 + 8 * (K // 8), so 64 asked are 68 kept; 7 asked are the 4 pivots.
    assert seen("dart", 576, 144) == [(2, 576, 576), (30, 144, 144)]
    for k, kept in ((192, 196), (128, 132), (64, 68), (63, 60), (7, 4), (570, 572), (575, 572)):
        assert seen("dart", 576, k, compat="public") == [(2, 576, 576), (30, kept, kept)]
    # 2880 of LLaVA-1.6: 320 asked are the authors' 324. An image of 3 tokens has fewer than the pivots: all stay.
    assert seen("dart", 2880, 320, compat="public")[-1] == (30, 324, 324)
    assert seen("dart", 3, 1, compat="public") == [(32, 3, 3)] and seen("dart", 3, 1)[-1] == (30, 1, 1)


def test_schedule_of_pyramiddrop():
    # 576 -> 72 halves three times; the mean is (576 + 288 + 144 + 72) / 4 = 270.
    want = [(8, 576, 576), (8, 288, 288), (8, 144, 144), (8, 72, 72)]
    assert seen("pyramiddrop", 576, 72) == seen("pyramiddrop", 576, 1, keep=[0.5, 0.25, 0.125]) == want
    assert layer_mean(make_dropper("pyramiddrop").schedule(576, 72, 32)) == 270
    # 2880 -> 144 is 1/20: x = 0.36840, so 2880 x = 1061.0 and 2880 x^2 = 390.87. In 40 layers after 10, 20 and 30.
    assert seen("pyramiddrop", 2880, 144, 40) == [(10, 2880, 2880), (10, 1061, 1061), (10, 390, 390), (10, 144, 144)]
    # In 60 layers (Yi) after 15, 30 and 45; in 3 after 1, 2 and 2, of which the last cut holds.
    assert [run[0] for run in seen("pyramiddrop", 576, 72, 60)] == [15, 15, 15, 15]
    assert seen("pyramiddrop", 576, 72, 3) == [(1, 576, 576), (1, 288, 288), (1, 72, 72)]


def test_schedule_of_sparsevlm():
    # Clusters on top of the published list: 276 dropped -> 83 recycled -> 9; then 309 - 200 = 109 -> 33 -> 4; then
    # 204 - 110 = 94 -> 29 -> 3.
    want = [(3, 576, 576), (4, 309, 309), (9, 204, 204), (16, 113, 113)]
    assert seen("sparsevlm", 576, 1, keep=[300, 200, 110]) == seen("sparsevlm", 576, 113) == want
    # 2.0: nothing on top, and 118 is what the list ends with.
    want = [(3, 576, 576), (4, 300, 300), (9, 200, 200), (16, 118, 118)]
    assert seen("sparsevlm", 576, 118, version="2.0") == want
    # 144 of 2880 is 28.8 of 576: nearest by factor is the list for 96 (249, 55, 27 with clusters), times 144/27.
    want = [(3, 2880, 2880), (4, 1328, 1328), (9, 293, 293), (16, 144, 144)]
    assert seen("sparsevlm", 2880, 144) == want
    # 40 layers: 2, 6 and 15 of 32 are 2.5, 7.5 and 18.75, which round to 2, 8 and 19.
    assert [run[0] for run in seen("sparsevlm", 576, 113, 40)] == [3, 6, 11, 20]


def test_schedule_of_fitprune():
    schedule = make_dropper("fitprune", ratio=60).schedule(576, 1, 32)
    # 14, 33 and 89 go in layers 0 to 2: attention sees what the layer before left, the MLP what is left now.
    assert schedule[:3] == [LayerTokens(576, 562), LayerTokens(562, 529), LayerTokens(529, 440)]
    assert schedule[31] == LayerTokens(576 - 449, 576 - 449)
    # 576 - 127 = 449 is what the 60 % table drops: the budget gives it back exactly.
    assert make_dropper("fitprune").schedule(576, 127, 32) == schedule
    # Of 2880 tokens, LLaVA-1.6's own 60 % table, and half as many tokens: each count halved and rounded down.
    whole = make_dropper("fitprune", ratio=60).schedule(2880, 1, 32)
    half = make_dropper("fitprune", ratio=60).schedule(1440, 1, 32)
    assert [layer.mlp for layer in whole[:3]] == [2880 - 98, 2880 - 411, 2880 - 690]
    assert [layer.mlp for layer in half[:3]] == [1440 - 49, 1440 - 49 - 156, 1440 - 49 - 156 - 139]
    for n, k, layers in ((2880, 144, 32), (2880, 720, 40), (576, 29, 60), (50, 1, 8)):
        assert make_dropper("fitprune").schedule(n, k, layers)[-1].mlp == k


@pytest.mark.parametrize("name, options", BY_BUDGET, ids=str)
@pytest.mark.parametrize("layers", [2, 3, 8, 32, 40, 60])
def test_a_schedule_never_rises_and_ends_at_the_budget(name, options, layers):
    if options.get("layer", 0) >= layers or (name in ("fastv", "dart") and layers == 2 and "layer" not in options):
        with pytest.raises(UserError, match=f"at most {layers - 1} is allowed"):
            make_dropper(name, **options).check(_sizes(layers))
        return
    for n in (1, 2, 7, 50, 576, 2144, 2880):
        for k in (1, 2, 3, 29, 144, n - 1, n, n + 9):
            if k < 1:
                continue
            dropper = make_dropper(name, **options)
            flat = [count for layer in dropper.schedule(n, k, layers) for count in layer]
            assert len(flat) == 2 * layers and flat[0] == n and flat == sorted(flat, reverse=True)
            assert flat[-1] == min(n, k)
            if dropper.place != "inside" and k < n:
                assert flat[-2] == k, "the last layer's attention sees the budget"


def _sizes(layers, hidden=4096, intermediate=11008):
    return SimpleNamespace(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=intermediate)


@pytest.mark.parametrize("name, options", BY_BUDGET, ids=str)
def test_a_budget_as_the_mean_over_layers(name, options):
    for n, layers in ((576, 32), (300, 40)):
        dropper = make_dropper(name, budget="mean", **options)
        means = {k: layer_mean(make_dropper(name, **options).schedule(n, k, layers)) for k in range(1, n + 1)}
        for target in (n // 2, n - 1):
            mean = layer_mean(dropper.schedule(n, target, layers))
            assert mean == max(value for k, value in means.items() if value <= target and k < n)
        assert dropper.schedule(n, n, layers) == [LayerTokens(n, n)] * layers
        smallest = min(means.values())
        below = max(1, int(smallest) - 1)
        if smallest > 1:
            with pytest.raises(UserError, match=f"at least {smallest:.1f} of an image's {n} tokens"):
                dropper.schedule(n, below, layers)


def test_means_by_hand():
    # FastV, 576 tokens, mean 171: (2 * 576 + 30 k) / 32 = 171 -> k = 144; its smallest mean is (1152 + 30) / 32 = 36.9.
    assert seen("fastv", 576, 171, budget="mean") == [(2, 576, 576), (30, 144, 144)]
    with pytest.raises(UserError, match="at least 36.9 of .* at least 37 is allowed"):
        make_dropper("fastv", budget="mean").schedule(576, 36, 32)
    # PyramidDrop: a mean of 270 is 288, 144, 72.
    assert seen("pyramiddrop", 576, 270, budget="mean")[-1] == (8, 72, 72)


def test_largest_remainder_by_hand():
    # 7 in proportion 1 : 2 : 3 is 1.17, 2.33, 3.5: the one that is left goes to the .5.
    assert largest_remainder([1, 2, 3], 7) == [1, 2, 4]
    # 3 over four equals: .75 each, and the lowest indices get theirs.
    assert largest_remainder([1, 1, 1, 1], 3) == [1, 1, 1, 0]
    assert largest_remainder([0, 5, 0], 4) == [0, 4, 0]


def test_clusters_count_towards_the_budget():
    # 50 tokens to 20: with 17 kept, 33 go, of which 33 * 3 // 10 + 1 = 10 are recycled, into 10 // 10 + 1 = 2: 19; with
    # 18 kept, 32 go, also 10 and 2: 20.
    assert with_total(20, 50) == (18, 2)
    # One token is left of 300: no room for the 9 or 10 clusters that the rule would make.
    assert with_total(1, 300) == (1, 0) and with_total(4, 300) == (1, 3)
    for now in range(2, 120):
        for total in range(1, now):
            kept, made = with_total(total, now)
            assert kept >= 1 and kept + made == total


# --- the rules by hand -----------------------------------------------------------------------------------------------


def one_hot_attention(rows):
    """A RowAttention with the given post-softmax rows [H][S][S], by queries that are one-hot and keys of logarithms."""
    probabilities = torch.tensor(rows, dtype=torch.float32)
    heads, length, _ = probabilities.shape
    key = probabilities.clamp(min=1e-30).log().transpose(1, 2).contiguous()  # key[h, j, i] = log p(i attends to j)
    query = torch.eye(length).expand(heads, length, length)
    return RowAttention(query, key, scaling=1.0)


def slots(start, count, queries, **more):
    return ImageSlots(start, count, torch.tensor(queries), **more)


# Two heads over five slots: BOS, three image tokens, one word.
BY_HAND = [
    [
        [1.0, 0, 0, 0, 0],
        [0.5, 0.5, 0, 0, 0],
        [0.2, 0.2, 0.6, 0, 0],
        [0.1, 0.3, 0.4, 0.2, 0],
        [0.1, 0.4, 0.1, 0.3, 0.1],
    ],
    [
        [1.0, 0, 0, 0, 0],
        [0.2, 0.8, 0, 0, 0],
        [0.5, 0.1, 0.4, 0, 0],
        [0.3, 0.1, 0.1, 0.5, 0],
        [0.4, 0.2, 0.2, 0.1, 0.1],
    ],
]


def test_attention_rows_by_hand():
    attention = one_hot_attention(BY_HAND)
    # Head mean of the last row: (.1 + .4) / 2, (.4 + .2) / 2, (.1 + .2) / 2, (.3 + .1) / 2, .1.
    torch.testing.assert_close(attention.mean(torch.tensor([4])), torch.tensor([0.25, 0.3, 0.15, 0.2, 0.1]))
    # Averaged with that of slot 3: (.1 + .3) / 2 = .2, (.3 + .1) / 2 = .2, (.4 + .1) / 2 = .25, (.2 + .5) / 2 = .35, 0.
    both = attention.mean(torch.tensor([3, 4]))
    torch.testing.assert_close(both, torch.tensor([0.225, 0.25, 0.2, 0.275, 0.05]))


def test_fastv_and_pyramiddrop_by_hand():
    attention = one_hot_attention(BY_HAND)
    for name in ("fastv", "pyramiddrop"):
        dropper = make_dropper(name)
        scores = dropper.score(attention, slots(1, 3, [4]))
        torch.testing.assert_close(scores, torch.tensor([0.3, 0.15, 0.2]))
        kept = dropper.choose(scores, Cut(1, 2), slots(1, 3, [4]), torch.zeros(3, 4)).kept
        assert kept.tolist() == [0, 2]


def test_fitprune_by_hand():
    # Head maxima of the image's rows (slots 1 to 3), columns 1 to 3: [.8, 0, 0], [.2, .6, 0], [.3, .4, .5]; their means
    # over three queries are 1.3/3, 1/3 and .5/3. The word's row has maxima .4, .2, .3.
    within, across = shares(one_hot_attention(BY_HAND), slots(1, 3, [4]))
    torch.testing.assert_close(within, torch.tensor([1.3, 1.0, 0.5]) / 3)
    torch.testing.assert_close(across, torch.tensor([0.4, 0.2, 0.3]))
    scores = make_dropper("fitprune").score(one_hot_attention(BY_HAND), slots(1, 3, [4]))
    torch.testing.assert_close(scores, torch.tensor([0.52, 0.2, 0.15]) / 3)
    assert keep_best(scores, 2).tolist() == [0, 1]


# Slots: BOS, eight image tokens, two words. Keys are L1 norms, in two heads of one number each.
NORMS = torch.tensor([9.0, 1, 2, 3, 4, 5, 6, 7, 8, 2, 3])
ANGLES = torch.tensor([0.0, 0, 10, 20, 30, 40, 50, 60, 70, 180, 90])


def dart_inputs(norms=NORMS, angles=ANGLES):
    """A RowAttention with keys of these norms, half in each head and one of them negative, and states at these angles."""
    key = torch.stack([norms / 2, -norms / 2])[..., None]
    radians = angles.deg2rad()
    return RowAttention(key[:, -1:], key, 1.0), torch.stack([radians.cos(), radians.sin()], dim=1) * norms[:, None]


def test_dart_by_hand():
    attention, states = dart_inputs()
    assert attention.key_norms().tolist() == NORMS.tolist()
    # Image pivots by norm: 7, 6, 5, 4 (of 0 .. 7), at 70, 60, 50 and 40 degrees; text pivots: slots 10 and 9, at 90 and
    # 180. Left are 0 .. 3, at 0, 10, 20 and 30. Six stay: pivots 7 and 6 add one each: 0, which is farthest from 7, and
    # then 1 of what is left.
    dart = make_dropper("dart")
    kept = [dart.select(attention, Cut(1, keep), slots(1, 8, [9, 10]), states).kept.tolist() for keep in range(1, 8)]
    assert kept == [[7], [6, 7], [5, 6, 7], [4, 5, 6, 7], [0, 4, 5, 6, 7], [0, 1, 4, 5, 6, 7], [0, 1, 2, 4, 5, 6, 7]]
    # A pivot opposite to what was farthest so far: the first image pivot, token 7, now at -60 degrees, adds 3.
    angles = ANGLES.clone()
    angles[8] = -60
    turned, turned_states = dart_inputs(NORMS, angles)
    kept = dart.select(turned, Cut(1, 5), slots(1, 8, [9, 10]), turned_states).kept
    assert kept.tolist() == [3, 4, 5, 6, 7]
    # Equal cosines: the lowest index.
    same, same_states = dart_inputs(NORMS, ANGLES * 0)
    kept = dart.select(same, Cut(1, 6), slots(1, 8, [9, 10]), same_states).kept
    assert kept.tolist() == [0, 1, 4, 5, 6, 7]
    # The answer is read from the image's last slot: it stays and is no pivot, and there is no text pivot. Pivots are
    # then 6, 5, 4 and 3.
    ends = slots(1, 8, [8], ends_prompt=True)
    kept = [dart.select(attention, Cut(1, keep), ends, states).kept.tolist() for keep in (1, 2, 5, 6)]
    assert kept == [[7], [6, 7], [3, 4, 5, 6, 7], [0, 3, 4, 5, 6, 7]]


def test_pivots_share_what_is_left():
    assert quotas(60, 8) == [8, 8, 8, 8, 7, 7, 7, 7] and quotas(64, 8) == [8] * 8 and quotas(2, 5) == [1, 1, 0, 0, 0]


DART_CHOICES = np.load(ROOT / "tests" / "data" / "dart_choices.npz")


@pytest.mark.parametrize("case, asked", [(1, 64), (2, 128), (3, 192)])
def test_recorded_choices_of_dart(case, asked):
    keys, states = (torch.tensor(DART_CHOICES[f"{case}_dart_{name}"]) for name in ("keys", "states"))
    attention, image = RowAttention(keys[:, -1:], keys, 1.0), slots(35, 576, range(611, 632))
    public, ours = make_dropper("dart", compat="public"), make_dropper("dart")
    (cut,) = public.cuts(576, asked, 32)
    kept = public.select(attention, cut, image, states).kept
    assert kept.tolist() == sorted(DART_CHOICES[f"{case}_dart_{asked}"].tolist()) and len(kept) == asked + 4
    pivots = DART_CHOICES[f"{case}_dart_{asked}_pivots"].tolist()
    by_norm = sorted(pivots, key=lambda slot: (slot >= 611, -float(attention.key_norms()[slot])))
    assert in_set_order(torch.tensor(by_norm)).tolist() == pivots != by_norm
    # Ours keeps the pivots, too, and exactly K.
    (cut,) = ours.cuts(576, asked, 32)
    mine = ours.select(attention, cut, image, states).kept.tolist()
    assert len(mine) == asked and {slot - 35 for slot in pivots if slot < 611} <= set(mine)


def test_sparsevlm_raters_by_hand():
    # Two image tokens and three words; raw products V X^T are [[ln 2, 0, ln 1], [ln 4, 0, ln 3]]: softmax over words
    # [.5, .25, .25] and [.5, .125, .375], means .5, .1875, .3125. Above the mean of 1/3 is the first word alone.
    log = torch.tensor([2.0, 4.0, 3.0]).log()
    image = torch.eye(2)
    text = torch.stack([torch.stack([log[0], log[1]]), torch.zeros(2), torch.stack([torch.tensor(0.0), log[2]])])
    assert make_dropper("sparsevlm").queries(image, text).tolist() == [0]
    # Words that are all alike are all raters, and so is a single one.
    assert make_dropper("sparsevlm").queries(image, torch.ones(3, 2)).tolist() == [0, 1, 2]
    assert make_dropper("sparsevlm").queries(image, text[:1]).tolist() == [0]
    # The score is the raters' mean row over both heads: here that of slots 3 and 4.
    scores = make_dropper("sparsevlm").score(one_hot_attention(BY_HAND), slots(1, 3, [3, 4]))
    torch.testing.assert_close(scores, torch.tensor([0.25, 0.2, 0.275]))


def test_clustering_by_hand():
    # On a line at 0, 1, 10, 11, 13 (D = 1), two clusters, so two nearest states, oneself among them: mean squared
    # distances .5, .5, .5, .5, 2; densities e^-.5 four times and e^-2. Among equals the later is denser: 11 is the
    # densest (separation: the largest distance, 13), then 10 (to 11: 1), 1 (to 10: 9), 0 (to 1: 1), 13 (to 11: 2).
    # Products: 11 -> 7.9, 1 -> 5.5, the others below 1: the centres are 11 (cluster 0) and 1 (cluster 1).
    states = torch.tensor([[0.0], [1.0], [10.0], [11.0], [13.0]])
    assert density_peaks(states, 2).tolist() == [1, 1, 0, 0, 0]
    assert density_peaks(torch.zeros(4, 3), 3).tolist().count(0) == 2, "equal states: every cluster has a member"
    assert density_peaks(states, 1).tolist() == [0] * 5 and sorted(density_peaks(states, 5).tolist()) == [0, 1, 2, 3, 4]


def test_recycling_by_hand():
    # Five tokens, two kept (scores .9 and .8), one made. Of the three dropped 3 * 3 // 10 + 1 = 1 is recycled, the best
    # (score .5): its state is the cluster's.
    states = torch.tensor([[1.0, 1], [2, 2], [3, 3], [4, 4], [5, 5]])
    scores = torch.tensor([0.1, 0.9, 0.5, 0.2, 0.8])
    choice = make_dropper("sparsevlm").choose(scores, Cut(2, 2, 1), slots(0, 5, [5]), states)
    assert choice.kept.tolist() == [1, 4] and choice.sources == [[2]] and choice.made.tolist() == [[3.0, 3.0]]
    # Of twelve dropped, four are recycled: 12 * 3 // 10 + 1. One cluster is their mean.
    states, scores = torch.arange(13.0)[:, None], torch.arange(13.0)
    choice = make_dropper("sparsevlm").choose(scores, Cut(2, 1, 1), slots(0, 13, [13]), states)
    assert choice.kept.tolist() == [12] and choice.sources == [[8, 9, 10, 11]] and choice.made.tolist() == [[9.5]]


def test_ties_go_to_the_lowest_index_and_no_number_goes_last():
    assert keep_best(torch.tensor([1.0, 2, 2, 1, 1]), 3).tolist() == [0, 1, 2]
    assert keep_best(torch.tensor([float("nan"), 0.1, 0.2, float("nan")]), 3).tolist() == [0, 1, 2]
    assert keep_best(torch.tensor([3.0, 2, 1]), 1, keep_last=True).tolist() == [2]


@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2), (4, 1)])
def test_rows_in_chunks_equal_plain_attention(heads, groups):
    generator = torch.Generator().manual_seed(heads)
    query, key = (torch.randn(h, 23, 8, generator=generator) for h in (heads, groups))
    scores = query @ key.repeat_interleave(heads // groups, dim=0).transpose(1, 2) * 0.3
    full = scores.masked_fill(torch.ones(23, 23, dtype=torch.bool).triu(1), float("-inf")).softmax(dim=-1)
    which = torch.tensor([3, 4, 9, 15, 16, 22])
    for chunk in (1, 2 * heads * 23, 10**6):
        attention = RowAttention(query, key, 0.3, chunk)
        torch.testing.assert_close(attention.mean(which), full[:, which].mean(dim=(0, 1)))
        torch.testing.assert_close(attention.head_max_sum(which), full[:, which].amax(dim=0).sum(dim=0))
    tail = RowAttention(query[:, -2:], key, 0.3)  # only the last two queries are there
    torch.testing.assert_close(tail.mean(torch.tensor([22])), full[:, 22].mean(dim=0))


# --- options and errors ----------------------------------------------------------------------------------------------


def test_names_need_no_torch():
    code = (
        "import sys; from llava.config import AdaVConfig; from llava.methods.inside_llm import dropper_names;"
        "assert set(dropper_names()) == {'fastv', 'fitprune', 'sparsevlm', 'pyramiddrop', 'dart'};"
        "AdaVConfig(method='fastv', options={'layer': 3}); assert 'torch' not in sys.modules;"
        "import llava.methods.inside_llm as d; d.DROPPERS; assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


BAD_OPTIONS = [
    ({"layer": 0}, "options.layer", "at least 1"),
    ({"layer": 2.5}, "options.layer", "whole number"),
    ({"ratio": 0}, "options.ratio", "above 0 and below 100"),
    ({"ratio": 100}, "options.ratio", "below 100"),
    ({"ratio": "60"}, "options.ratio", "percentage"),
    ({"keep": 192}, "options.keep", "a list of three"),
    ({"keep": [300, 200]}, "options.keep", "a list of three"),
    ({"keep": [200, 300, 110]}, "options.keep", "none above the one before"),
    ({"keep": [0.5, 0.25, 0]}, "options.keep", "below 1"),
    ({"keep": [0.5, 100, 50]}, "options.keep", "three counts"),
    ({"keep": [1.0, 0.5, 0.25]}, "options.keep", "below 1"),
    ({"version": 1.0}, "options.version", '"1.0", "2.0"'),
    ({"table": ""}, "options.table", "path"),
    ({"budget": "median"}, "options.budget", '"last", "mean"'),
    ({"budget": "mean", "keep": [3, 2, 1]}, "options.keep", "mean"),
    ({"budget": "mean", "ratio": 60}, "options.ratio", "mean"),
]


@pytest.mark.parametrize("options, key, words", BAD_OPTIONS, ids=str)
def test_bad_options_are_one_sentence(options, key, words):
    with pytest.raises(ConfigError) as caught:
        AdaVConfig(method="fastv", options=options)
    message = str(caught.value)
    assert key in message and words in message and "\n" not in message


def test_options_that_do_not_go_together():
    for name, options, words in (
        ("fastw", {}, "allowed are fastv, fitprune, sparsevlm, pyramiddrop, dart"),
        ("fastv", {"keep": [3, 2, 1]}, "allowed are budget, layer"),
        ("fitprune", {"ratio": 65}, "options.ratio is 65, but the shipped tables are for 10, 20, 30, 40"),
        ("pyramiddrop", {"keep": [3, 2, 1], "budget": "mean"}, "states what is kept"),
        ("fitprune", {"table": "nowhere.json"}, "nowhere.json: no FitPrune table can be read there"),
    ):
        with pytest.raises(UserError) as caught:
            make_dropper(name, **options)
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_fitted_model_is_not_warned_about(recwarn):
    make_dropper("fitprune").check(_sizes(32))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="40 layers of 5120 and 13824"):
        make_dropper("fitprune").check(_sizes(40, 5120, 13824))


# --- table files -----------------------------------------------------------------------------------------------------


def test_shipped_tables():
    tables = {(table.image_tokens, table.ratio): table for table in read_tables()}
    assert {ratio for tokens, ratio in tables if tokens == 576} == {10, 20, 30, 40, 50, 55, 60, 70, 80, 90}
    assert tables[576, 80].drops[:4] == (128, 127, 118, 35) and sum(tables[576, 80].drops) == 514
    # Over twice the depth each layer's drop is halved; over half of it neighbours are added up.
    table = tables[576, 90]
    assert table.over(64)[:4] == [131, 131, 76.5, 76.5] and table.over(16)[:2] == [415, 99]
    assert sum(table.over(40)) == pytest.approx(539)


def test_a_table_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    table = Table("tiny", 50.0, 16, (4, 48, 80), (4, 3, 1, 0))
    write_table(path, table, "here")
    assert read_tables(path) == (table,)
    write_table(path, Table("tiny", 25.0, 16, (4, 48, 80), (1, 1, 1, 0)), "here")
    assert [table.ratio for table in read_tables(path)] == [25, 50]
    assert seen("fitprune", 16, 1, 4, table=str(path), ratio=50) == [(1, 16, 12), (1, 12, 9), (1, 9, 8), (1, 8, 8)]
    with pytest.raises(UserError, match="options.ratio is 60, but .*mine.json are for 25, 50 %"):
        make_dropper("fitprune", table=str(path), ratio=60)
    with pytest.raises(UserError, match="belongs into another file"):
        write_table(path, Table("other", 25.0, 16, (4, 48, 80), (1, 1, 1, 0)), "here")


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "is no JSON file"),
        ("[]", "is no FitPrune table file"),
        ({"tables": {}}, "is no FitPrune table file"),
        ({"tables": {"50": [1, 2]}}, "is not one count of at least 0 for each of 4 layers"),
        ({"tables": {"50": [1, 2, -1, 0]}}, "is not one count of at least 0"),
        ({"tables": {"50": [10, 6, 0, 0]}}, "leaves some of 16 tokens"),
        ({"tables": {"half": [1, 1, 0, 0]}}, "is no FitPrune table file"),
    ],
    ids=str,
)
def test_bad_table_files(tmp_path, content, words):
    path = tmp_path / "table.json"
    if isinstance(content, dict):
        head = {"model": "m", "layers": 4, "hidden_size": 48, "intermediate_size": 80, "image_tokens": 16}
        content = json.dumps((head if content["tables"] else {}) | content)
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        make_dropper("fitprune", table=str(path))
