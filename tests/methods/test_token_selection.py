"""Every selector on every grid and budget, AdaV against brute force, and the public code's recorded choices."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_tokens import WIDTH, flat_image, layout, make_image, make_text

from llava.common.errors import UserError
from llava.methods.before_llm import SELECTORS, ImageTokens, Selector, option_names, scores, select, selector_names
from llava.methods.before_llm.adav import best_split
from llava.methods.before_llm.base import take
from llava.methods.before_llm.tiles import split_evenly
from llava.methods.before_llm.two_lists import TwoLists, unions_of_best

GRIDS = [None, (1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]  # columns x rows of crops
BUDGETS = [1, 7, 29, 58, 144, "N", "N + 5"]
CHOOSERS = [name for name in SELECTORS if SELECTORS[name].uses_budget]
# --- every method ----------------------------------------------------------------------------------------------------


def union_of_best(first, k_first, second, k_second):
    ((kept, _),) = unions_of_best([TwoLists(first, second, k_first, k_first + k_second)])
    return kept


def union_by_a_plain_loop(first, k_first, second, k_second):
    """The rule of two_lists.py over whole lists, step by step."""
    order = [torch.sort(scores, descending=True, stable=True).indices.tolist() for scores in (first, second)]
    value = [scores.double().clamp_min(0).tolist() for scores in (first, second)]
    place = [k_first, k_second]
    mass = [sum(value[s][i] for i in order[s][: place[s]]) for s in (0, 1)]
    kept = set(order[0][:k_first]) | set(order[1][:k_second])
    while len(kept) < k_first + k_second:
        for s in (0, 1):
            while order[s][place[s]] in kept:
                place[s] += 1
        token = [order[s][place[s]] for s in (0, 1)]
        gain = [value[s][token[s]] / mass[s] if mass[s] else 0.0 for s in (0, 1)]
        side = 0 if gain[0] >= gain[1] else 1
        kept.add(token[side])
        mass[side] += value[side][token[side]]
    return sorted(kept)


def test_unions_of_a_batch_are_those_of_a_plain_loop():
    """Ties, zeros, numbers below zero, lists that agree, and budgets up to all patches."""
    generator = torch.Generator().manual_seed(0)
    lists, want = [], []
    for case in range(400):
        patches = int(torch.randint(1, 60, (1,), generator=generator))
        levels = (3, 10, 10**6)[case % 3]
        first, second = (torch.randint(-levels // 4, levels, (patches,), generator=generator) / levels for _ in "ab")
        second = first if case % 5 == 0 else second
        budget = patches if case % 7 == 0 else int(torch.randint(1, patches + 1, (1,), generator=generator))
        k_first = int(torch.randint(0, budget + 1, (1,), generator=generator))
        lists.append(TwoLists(first, second, torch.tensor(k_first) if case % 2 else k_first, budget))
        want.append((union_by_a_plain_loop(first, k_first, second, budget - k_first), k_first))
    assert [(kept.tolist(), k_first) for kept, k_first in unions_of_best(lists)] == want


def check_indices(name, kept, everything=False):
    """(which kept tokens are patches, their indices), after a look at the order of `indices` (decision 4)."""
    patch = kept.indices >= 0
    indices = kept.indices[patch]
    if SELECTORS[name].makes_tokens and not everything:
        assert len(indices.unique()) == len(indices), "distinct"
        merged = [index for source in kept.sources for index in source]
        assert len(kept.sources) == int((~patch).sum()) and not set(merged) & set(indices.tolist())
        assert len(set(merged)) == len(merged), "a patch goes into one token"
    else:
        assert patch.all() and (indices[1:] > indices[:-1]).all(), "ascending and distinct"
        assert kept.sources == []
    return patch, indices


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", CHOOSERS)
def test_requested_is_kept(name, grid, budget):
    image, text = make_image(grid), make_text()
    n, patches = len(image.tile), int((image.tile >= 0).sum())
    budget = {"N": n, "N + 5": n + 5}.get(budget, budget)
    kept = select(name, image, text, budget)
    assert len(kept.indices) == len(kept.features) == (n if budget >= patches else budget)
    patch, indices = check_indices(name, kept, everything=budget >= patches)
    assert budget >= patches or (image.tile[indices] >= 0).all(), "newline tokens are no candidates"
    assert torch.equal(kept.features[patch], image.features[indices])
    assert kept.total == n
    for field in ("tile", "row", "column"):
        assert torch.equal(getattr(kept, field)[patch], getattr(image, field)[indices])
        assert (getattr(kept, field)[~patch] == -1).all()
    assert torch.equal(kept.saliency[patch].nan_to_num(-1), image.saliency[indices].nan_to_num(-1))
    assert kept.saliency[~patch].isnan().all()
    assert kept.features.isfinite().all() and kept.features.dtype == image.features.dtype


@pytest.mark.parametrize("name", CHOOSERS)
def test_a_budget_of_all_patches_is_none(name):
    image = make_image((2, 1))
    patches = len(image.patches)
    everything = select("none", image, make_text(), 7)
    assert len(everything.indices) == len(image.tile) > patches
    assert torch.equal(select(name, image, make_text(), patches).indices, everything.indices)
    assert len(select(name, image, make_text(), patches - 1).indices) == patches - 1


def test_no_image_keeps_nothing_and_needs_no_tower():
    image = make_image()
    for budget in (1, len(image.tile) + 5):
        kept = select("no_image", image, make_text(), budget)
        assert kept.features.shape == (0, WIDTH) and len(kept.indices) == len(kept.tile) == 0
        assert kept.total == len(image.tile)
    assert [name for name in SELECTORS if not SELECTORS[name].needs_image] == ["no_image"]


@pytest.mark.parametrize("name", CHOOSERS)
def test_a_choice_does_not_depend_on_other_images(name):
    samples = [(make_image(grid, seed=i, key=i), make_text(3 + i, seed=i)) for i, grid in enumerate(GRIDS)]
    alone = [select(name, *samples[i], 29).indices for i in range(len(samples))]
    torch.manual_seed(5)
    for i in (4, 2, 0, 5, 1, 3, 2):
        assert torch.equal(select(name, *samples[i], 29).indices, alone[i])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
# random draws places, and the chunks of HoloV are runs of tokens in LLM order.
@pytest.mark.parametrize("name", [name for name in CHOOSERS if name not in ("random", "holov")])
def test_shuffled_tokens_and_words_give_the_same_patches(name, grid):
    def places(kept):
        return {(int(t), int(r), int(c)) for t, r, c in zip(kept.tile, kept.row, kept.column, strict=True)}

    image, text = make_image(grid), make_text()
    order = torch.randperm(len(image.tile), generator=torch.Generator().manual_seed(3))
    fields = (image.features, image.saliency, image.tile, image.row, image.column)
    shuffled = ImageTokens(*(field[order] for field in fields), tower=image.tower)
    assert places(select(name, shuffled, text.flip(0), 58)) == places(select(name, image, text, 58))


@pytest.mark.parametrize("name", CHOOSERS)
def test_half_precision_features_are_scored_in_single(name):
    image = make_image(dtype=torch.float16)
    kept = select(name, image, make_text().half(), 58)
    assert kept.features.dtype == torch.float16
    image.features = image.features.float()
    assert torch.equal(kept.indices, select(name, image, make_text().half().float(), 58).indices)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_do_not_depend_on_the_dtype(dtype):
    image, text = make_image(dtype=dtype), make_text().to(dtype)
    image.saliency = image.saliency.to(dtype)
    low = scores.text_to_image(image, text, 0.01), scores.max_cosine(image, text), scores.patch_saliency(image)
    image.features, image.saliency = image.features.float(), image.saliency.float()
    text = text.float()
    single = scores.text_to_image(image, text, 0.01), scores.max_cosine(image, text), scores.patch_saliency(image)
    for one, other in zip(low, single, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


@pytest.mark.parametrize("spoil", ["nan", "inf", "zero", "equal", "no saliency", "zero text", "nan text", "huge"])
@pytest.mark.parametrize("budget", [1, 2, 3, 58])
@pytest.mark.parametrize("name", CHOOSERS)
def test_degenerate_input_still_gives_the_budget(name, budget, spoil):
    image, text = make_image((2, 1), dtype=torch.float16), make_text().half()
    states = (image.features, image.tower.hidden.flatten(0, 1), image.tower.keys.flatten(0, 1))
    if spoil == "no saliency":
        image.saliency[:] = math.nan
    elif spoil == "equal":
        image.saliency[image.tile >= 0] = 0.001
    elif "text" in spoil:
        text[:] = 0 if spoil == "zero text" else math.nan
    for state in states:
        if spoil == "nan":
            state[::3] = math.nan
        elif spoil == "inf":
            state[::3, 0] = math.inf
        elif spoil == "zero":
            state.zero_()
        elif spoil == "equal":
            state[:] = state[0].clone()
        elif spoil == "huge":
            state *= 1e4  # the squared norm overflows in half precision
    kept = select(name, image, text, budget)
    patch, indices = check_indices(name, kept)
    assert len(kept.indices) == budget and (image.tile[indices] >= 0).all()


def test_a_broken_patch_is_chosen_last_by_text():
    image = make_image()
    image.features[::3] = math.nan
    sound = int(((torch.arange(len(image.tile)) % 3 > 0) & (image.tile >= 0)).sum())
    kept = select("t2i", image, make_text(), sound)
    assert kept.features.isfinite().all()


@pytest.mark.parametrize("name", ["t2i", "mix", "adav"])
def test_without_text_saliency_decides(name):
    image, no_text = make_image(), make_text(0)
    assert torch.equal(select(name, image, no_text, 29).indices, select("cls", image, no_text, 29).indices)


# --- names, options, errors ------------------------------------------------------------------------------------------


def test_names_need_no_torch():
    code = (
        "import sys; import llava.methods.before_llm as s; names = s.selector_names();"
        "assert {'adav', 'visionzip', 'divprune', 'scope', 'random', 'none', 'no_image'} <= set(names), names;"
        "assert 'torch' not in sys.modules;"
        "s.SELECTORS; assert 'torch' in sys.modules; assert tuple(s.SELECTORS) == names"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_users_own_selector_is_a_method(monkeypatch):
    class First(Selector):
        def keep(self, image, text, budget):
            return take(image, image.patches[:budget])

    monkeypatch.setitem(SELECTORS, "first", First)
    assert "first" in selector_names() and option_names("first") == ()
    assert select("first", make_image(), make_text(), 3).indices.tolist() == [0, 1, 2]


def test_option_names():
    assert option_names("adav") == ("min_share", "temperature", "compat")
    assert option_names("random") == ("seed",)
    assert option_names("cls") == ()


@pytest.mark.parametrize(
    "name, budget, options, words",
    [
        ("adavv", 7, {}, ["'adavv'", "fastervlm", "no_image"]),
        ("adav", 7, {"share": 1}, ["'share'", "min_share, temperature, compat"]),
        ("cls", 7, {"seed": 1}, ["'seed'", "'cls'", "none"]),
        ("adav", 0, {}, ["0", "at least 1"]),
        ("none", -5, {}, ["-5", "at least 1"]),
        ("cls", 7.0, {}, ["7.0", "whole number"]),
        ("cls", True, {}, ["True", "whole number"]),
        ("adav", 7, {"min_share": 0.51}, ["0.51", "0 to 0.5"]),
        ("adav", 7, {"min_share": "0.2"}, ["'0.2'", "0 to 0.5"]),
        ("adav", 7, {"temperature": 0}, ["temperature", "above 0"]),
        ("t2i", 7, {"temperature": math.nan}, ["temperature", "above 0"]),
        ("adav", 7, {"compat": "publik"}, ["'publik'", '"public"']),
        ("random", 7, {"seed": -1}, ["-1", "at least 0"]),
    ],
)
def test_bad_requests_are_sentences(name, budget, options, words):
    with pytest.raises(UserError) as error:
        select(name, make_image(), make_text(), budget, **options)
    for word in words:
        assert word in str(error.value)


def test_tensors_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="saliency"):
        flat_image(torch.zeros(4, 2), torch.zeros(3))


# --- AdaV ------------------------------------------------------------------------------------------------------------


def naive_text_score(features, text, temperature=0.01):
    v, x = features.double().numpy(), text.double().numpy()
    cosine = (x @ v.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(v, axis=1)
    e = np.exp((cosine - cosine.max(1, keepdims=True)) / temperature)
    return (e / e.sum(1, keepdims=True)).max(0)


@pytest.mark.parametrize("name", ["adav", "t2i", "adav_cover"])
def test_however_small_the_temperature(name):
    """Each word then has one patch: the choice is that of a temperature that is small but not too small for float32."""
    draw = torch.Generator().manual_seed(5)
    image = flat_image(torch.randn(60, 48, generator=draw), torch.rand(60, generator=draw))
    text = torch.randn(4, 48, generator=draw)
    kept = [select(name, image, text, 16, temperature=value).indices for value in (1e-20, 1e-40, 5e-324)]
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])


def naive_masses(scores, budget):
    ranked = sorted(scores.tolist(), reverse=True)
    return [sum(ranked[:k]) for k in range(budget + 1)]


def naive_union(t, a, k_text, budget):
    """Decision 8, token by token, with lists that are searched from their beginning every time."""
    by_t = sorted(range(len(t)), key=lambda i: (-t[i], i))
    by_a = sorted(range(len(a)), key=lambda i: (-a[i], i))
    chosen_t, chosen_a = by_t[:k_text], by_a[: budget - k_text]
    while len(set(chosen_t + chosen_a)) < budget:
        next_t = next(i for i in by_t if i not in chosen_t + chosen_a)
        next_a = next(i for i in by_a if i not in chosen_t + chosen_a)
        if t[next_t] / sum(t[i] for i in chosen_t) >= a[next_a] / sum(a[i] for i in chosen_a):
            chosen_t.append(next_t)
        else:
            chosen_a.append(next_a)
    return sorted(set(chosen_t + chosen_a))


def random_case(seed):
    """An image whose two scores are correlated, more or less peaked; a question, a budget, the options of AdaV."""
    draw = np.random.default_rng(seed)
    image = make_image(GRIDS[seed % len(GRIDS)], seed=seed, side=int(draw.integers(3, 8)), cut=1)
    text = make_text(int(draw.integers(1, 9)), seed=seed)
    patches = image.patches
    share, temperature = float(draw.choice([0, 0.1, 0.25, 0.4, 0.5])), float(draw.choice([0.01, 0.1, 0.3]))
    t = naive_text_score(image.features[patches], text, temperature)
    noise = draw.random(len(patches)) ** draw.uniform(0.5, 6)
    mixed = noise * (t / t.max()) ** draw.uniform(0, 0.6)
    image.saliency[patches] = torch.tensor(mixed / mixed.sum() * 0.9, dtype=torch.float32)
    budget = int(draw.integers(2, len(patches)))
    return image, text, budget, {"min_share": share, "temperature": temperature}


def test_adav_reaches_the_best_split_and_fills_it():
    clear_cases = filled_cases = 0
    for seed in range(150):
        image, text, budget, options = random_case(seed)
        patches = image.patches
        kept = select("adav", image, text, budget, **options)
        # The single-precision scores, checked by themselves: two words that are all about one patch each tie at 1.0.
        t, a = (kept.report[name][patches].double().numpy() for name in ("text_score", "saliency_score"))
        expected_t = naive_text_score(image.features[patches], text, options["temperature"])
        np.testing.assert_allclose(t, expected_t, rtol=1e-4, atol=1e-30)
        np.testing.assert_array_equal(a, image.saliency[patches].double().numpy())
        masses_t, masses_a = naive_masses(t, budget), naive_masses(a, budget)
        floor = int(options["min_share"] * budget + 1e-6)
        splits = range(floor, budget - floor + 1)
        objective = {k: math.sqrt(masses_t[k] * masses_a[budget - k]) for k in splits}

        k_text = kept.report["k_text"]
        assert k_text in splits and kept.report["k_saliency"] == budget - k_text
        best = max(objective.values())
        assert objective[k_text] >= best * (1 - 1e-6), f"seed {seed}"
        if sum(value > best * (1 - 1e-6) for value in objective.values()) == 1:
            clear_cases += 1
            expected = naive_union(t, a, k_text, budget)
            assert kept.indices.tolist() == patches[expected].tolist(), f"seed {seed}"
            top_t = set(np.argsort(-t, kind="stable")[:k_text].tolist())
            filled_cases += bool(top_t & set(np.argsort(-a, kind="stable")[: budget - k_text].tolist()))
    assert clear_cases > 100 and filled_cases > 50, "the cases test what they are meant to test"


def test_adav_ignores_the_scale_of_a_score():
    for seed in range(20):
        image, text, budget, options = random_case(seed)
        plain = select("adav", image, text, budget, **options)
        for factor in (1e-4, 0.37, 2.0, 1e5):
            image.saliency *= factor
            scaled = select("adav", image, text, budget, **options)
            assert scaled.report["k_text"] == plain.report["k_text"]
            assert torch.equal(scaled.indices, plain.indices)
            image.saliency /= factor
        t, a = (plain.report[s][image.patches] for s in ("text_score", "saliency_score"))
        floor = int(options["min_share"] * budget + 1e-6)
        for factor in (1e-4, 0.37, 1e5):
            assert best_split(t * factor, a, budget, floor) == plain.report["k_text"]


@pytest.mark.parametrize(
    "share, budget, floor", [(0.25, 7, 1), (0.25, 58, 14), (0.29, 100, 29), (0.5, 29, 14), (0, 29, 0)]
)
def test_floors_bind_where_one_list_is_worthless(share, budget, floor):
    image, text = make_image(), make_text()
    saliency = image.saliency.clone()
    flat = torch.full_like(saliency, 1e-3)
    peaked = flat * 1e-6
    peaked[image.patches[:3]] = 1.0
    # Three tokens hold all saliency: no more of it is worth having, the rest goes to text.
    image.saliency = peaked
    k_saliency = select("adav", image, text, budget, min_share=share).report["k_saliency"]
    assert k_saliency == max(floor, min(3, budget - floor))
    # One text direction holds all the similarity in two patches.
    image.saliency = flat
    image.features[image.patches[5:7]] = text[0]
    k_text = select("adav", image, text[:1], budget, min_share=share).report["k_text"]
    assert k_text == max(floor, 2)


def test_equal_splits_give_the_smallest_k_text():
    constant = torch.full((200,), 0.00171, dtype=torch.float32)
    for budget in (1, 2, 7, 29, 58, 145):
        assert best_split(constant, constant * 1.7, budget, 0) == budget // 2
    # One entry holds everything: any split with at least one of each captures the same.
    single = torch.zeros(200)
    single[17] = 1
    assert best_split(single, single, 29, 0) == 1
    assert best_split(single, single, 29, 7) == 7
    # So do splits that differ by no more than rounding does, at every scale.
    faint = torch.cat([torch.full((6,), 0.7), torch.full((100,), 6e-16)])
    for scale in (1, 0.37, 1e-4, 12345):
        assert best_split(faint * scale, faint.round(decimals=3), 29, 0) == 6


def test_fill_by_hand():
    t = torch.tensor([0.0, 0.6, 0.3, 0.05, 0.2, 0.0])
    a = torch.tensor([0.9, 0.0, 0.5, 0.02, 0.0, 0.1])
    # by text 1, 2; by saliency 0, 2: three tokens. Next by text: 4, 0.2 / 0.9; by saliency: 5, 0.1 / 1.4.
    assert union_of_best(t, 2, a, 2).tolist() == [0, 1, 2, 4]
    # Two more: 4 again, then 3 (0.05 / 1.1 = 0.045) against 5 (0.1 / 1.4 = 0.071).
    a3, t3 = torch.tensor([0.9, 0.4, 0.5, 0.02, 0.0, 0.1]), t
    assert union_of_best(t3, 2, a3, 3).tolist() == [0, 1, 2, 4, 5]
    # An exact tie goes to text.
    t4, a4 = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1.0, 0.0, 0.5])
    assert union_of_best(t4, 1, a4, 1).tolist() == [0, 1]
    # A list that is all zeros has nothing to offer.
    assert union_of_best(torch.tensor([1.0, 0.5, 0.0]), 1, torch.zeros(3), 1).tolist() == [0, 1]
    assert union_of_best(torch.zeros(3), 1, torch.tensor([1.0, 0.0, 0.5]), 1).tolist() == [0, 2]


@pytest.mark.parametrize("name", ["adav", "t2i", "mix", "cls", "fastervlm"])
def test_ties_go_to_the_lowest_index(name):
    # 37 half-precision patches of three kinds: kind 0 is what the text says, kind 1 is salient, kind 2 neither.
    kinds = torch.arange(37) % 3
    directions = torch.randn(3, 130, generator=torch.Generator().manual_seed(0)).half()
    image = flat_image(directions[kinds], torch.tensor([0.001, 0.01, 0.0001])[kinds].half())
    text = directions[:1] + 0.05
    by_text, salient = [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36], list(range(1, 37, 3))
    expected = {
        "t2i": by_text[:7],
        "cls": salient[:7],
        "fastervlm": salient[:7],
        "mix": sorted(by_text[:4] + salient[:3]),
        "adav": sorted(by_text[:3] + salient[:4]),  # equal gains: the smallest k_text of 3 and 4
    }
    assert select(name, image, text, 7).indices.tolist() == expected[name]


def test_report_has_both_scores_of_every_patch():
    image, text = make_image(), make_text()
    report = select("adav", image, text, 58).report
    patch = image.tile >= 0
    for name in ("text_score", "saliency_score"):
        assert report[name].dtype == torch.float32
        assert torch.equal(~report[name].isnan(), patch)
    assert torch.equal(report["saliency_score"][patch], image.saliency[patch])
    np.testing.assert_allclose(report["text_score"][patch], naive_text_score(image.features[patch], text), rtol=1e-4)


def test_long_questions_are_scored_in_parts(monkeypatch):
    image, text = make_image(), make_text(50)
    whole = scores.text_to_image(image, text, 0.01), scores.max_cosine(image, text)
    monkeypatch.setattr(scores, "CHUNK", 3 * len(image.patches))
    parts = list(scores._cosines(scores.unit_patches(image), text))
    assert len(parts) == 17 and max(len(part) for part in parts) == 3
    for one, other in zip(
        whole, (scores.text_to_image(image, text, 0.01), scores.max_cosine(image, text)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


# --- compat="public" -------------------------------------------------------------------------------------------------

PUBLIC = np.load(Path(__file__).parents[1] / "data" / "adav_public_choices.npz")
PUBLIC_GRIDS = {(640, 480): (2, 2), (600, 300): (2, 1), (300, 600): (1, 2), (1000, 300): (3, 1), (300, 1000): (1, 3)}


def public_case(case):
    width, height, tiles, budget = PUBLIC[f"{case}_meta"].tolist()
    slots = layout(PUBLIC_GRIDS[width, height], side=24, cut=0, newline=False)
    tile, row, column = torch.tensor(slots).T
    attention = torch.tensor(PUBLIC[f"{case}_cls"])
    assert attention.shape == (tiles, 576)
    features = torch.tensor(PUBLIC[f"{case}_features"])
    image = ImageTokens(features, attention[tile, 24 * row + column], tile, row, column)
    return image, torch.tensor(PUBLIC[f"{case}_text"]), budget


@pytest.mark.parametrize("case", range(1, 6))
def test_the_public_codes_choices(case):
    image, text, budget = public_case(case)
    kept = select("adav", image, text, budget, compat="public")
    assert kept.indices.tolist() == PUBLIC[f"{case}_kept"].tolist()
    assert torch.equal(kept.features, image.features[kept.indices])
    assert kept.report["k_text"] + kept.report["k_saliency"] == len(kept.indices)
    fixed = select("adav", image, text, budget).indices
    assert len(fixed) == budget and set(fixed.tolist()) != set(kept.indices.tolist())


@pytest.mark.parametrize(
    "grid, budget, kept",
    [((2, 2), 720, 720), ((2, 2), 288, 280), ((2, 2), 144, 140), ((3, 1), 144, 144), ((1, 2), 29, 24), (None, 29, 28)],
)
def test_the_public_codes_rounding(grid, budget, kept):
    image = make_image(grid, side=24, cut=0, newline=False)
    assert len(select("adav", image, make_text(), budget, compat="public").indices) == kept
    assert len(select("adav", image, make_text(0), budget, compat="public").indices) == kept


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_public_refuses_what_its_code_never_saw(grid):
    with pytest.raises(UserError, match="newline"):
        select("adav", make_image(grid), make_text(), 58, compat="public")
    if grid:
        with pytest.raises(UserError, match="padding"):
            select("adav", make_image(grid, newline=False), make_text(), 58, compat="public")
        with pytest.raises(UserError, match="at least"):
            select("adav", make_image(grid, cut=0, newline=False), make_text(), 5, compat="public")


# --- FasterVLM, mix, random ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "budget, room, quota",
    [
        (10, [9, 9, 9, 9, 9], [2, 2, 2, 2, 2]),
        (12, [9, 9, 9, 9, 9], [3, 3, 2, 2, 2]),
        (12, [9, 1, 9, 9, 9], [4, 1, 3, 2, 2]),
        (12, [9, 0, 1, 9, 9], [5, 0, 1, 3, 3]),
        (19, [9, 1, 1, 9], [9, 1, 1, 8]),
        (20, [9, 1, 1, 9], [9, 1, 1, 9]),
        (14, [5, 1, 1, 9], [5, 1, 1, 7]),
        (7, [20], [7]),
    ],
)
def test_even_split_over_tiles(budget, room, quota):
    assert split_evenly(budget, room) == quota


def test_fastervlm_keeps_the_most_salient_of_each_tile():
    image = make_image((2, 2), cut=5)
    kept = select("fastervlm", image, make_text(), 144)
    assert torch.bincount(kept.tile).tolist() == [29, 29, 29, 29, 28]
    for tile in range(5):
        chosen = kept.saliency[kept.tile == tile]
        others = image.saliency[image.tile == tile].sort(descending=True).values
        assert torch.equal(chosen.sort(descending=True).values, others[: len(chosen)])


def test_fastervlm_gives_on_what_a_tile_lacks():
    image = make_image((1, 2), side=7, cut=3)  # the crops are one column wide: 7 patches each
    kept = select("fastervlm", image, make_text(), 45)
    assert torch.bincount(kept.tile).tolist() == [31, 7, 7]


def test_mix_gives_the_odd_token_to_text():
    image, text = make_image(), make_text()
    patches = image.patches
    v, x = image.features[patches].double(), text.double()
    cosine = (x @ v.T / x.norm(dim=1)[:, None] / v.norm(dim=1)).amax(0)
    kept = set(select("mix", image, text, 7).indices.tolist())
    best = set(patches[cosine.argsort(descending=True)[:4]].tolist())
    salient = patches[image.saliency[patches].argsort(descending=True)].tolist()
    assert best <= kept and kept - best == set([i for i in salient if i not in best][:3])


def test_random_depends_on_seed_and_key_alone():
    def draw(key, seed=0, image_seed=0):
        return select("random", make_image(seed=image_seed, key=key), make_text(), 58, seed=seed).indices.tolist()

    torch.manual_seed(1)
    first = draw(12)
    torch.manual_seed(2)
    assert draw(12, image_seed=9) == first
    draws = [draw(key, seed) for key in (12, 13, -12, 2**63) for seed in (0, 1)]
    assert len({tuple(d) for d in draws}) == 8
    state = torch.get_rng_state()
    draw(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_is_uniform_over_patches():
    image = make_image((1, 2), side=4, cut=1)
    patches = image.patches
    counts = torch.zeros(len(image.tile))
    for key in range(1200):
        image.key = key
        counts[select("random", image, make_text(0), 8).indices] += 1
    expected = 1200 * 8 / len(patches)
    chi_square = float(((counts[patches] - expected) ** 2 / expected).sum())
    freedom = len(patches) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) and counts.sum() == counts[patches].sum()
