"""The rules of the cache policies, worked out by hand: counts, H2O on six tokens, ties, and the configuration's switches."""

import pytest
import torch
from cache_cases import FILTER, text, vision
from tiny_checkpoints import build_reference, save_llava_hf

from llava.common.errors import UserError
from llava.config import AdaVConfig, ConfigError
from llava.kernels.evict import evict
from llava.methods.attention_rows import RowAttention
from llava.methods.inside_llm.plan import Cut
from llava.methods.inside_llm.prefill_filter import PrefillFilter
from llava.methods.kv_cache.avl import AVL
from llava.methods.kv_cache.base import Budget, Counts, RowSpans
from llava.methods.kv_cache.full import Full
from llava.methods.kv_cache.h2o import H2O
from llava.methods.kv_cache.scores import Centred, Latest, Summed
from llava.model.builder import load_pretrained_model
from llava.model.decoding.adaptive_cache import Caching

NEVER = 1e-13  # a probability that no sum shows


def queries(*rows, size=8):
    """[1, 1, R, size] queries that attend to one-hot keys with the probabilities of `rows`, token by token."""
    padded = torch.tensor([[*row, *[NEVER] * (size - len(row))] for row in rows])
    return padded.clamp(min=NEVER).log()[None, None]


def one_hot(*tokens, size=8):
    return torch.eye(size)[list(tokens)][None, None]


def prefilled(policy, rows, spans, steps):
    """A layer after prefill; `layer.cache` is the cache that it is the one layer of."""
    cache, keys = Caching(policy, 1, [spans], torch.tensor([[len(rows)]])).cache(steps), one_hot(*range(len(rows)))
    cache.begin_prefill(1, len(rows), right=True)
    cache.fill(0, queries(*rows), keys, keys, 1.0)
    cache.layers[0].cache = cache
    return cache.layers[0]


def step(layer, token, paid):
    """Decode step of `token` with attention `paid` {token: probability}: what it read of each token."""
    layer.cache.advance()
    layer.update(one_hot(token), one_hot(token))
    row = [paid.get(i, NEVER) for i in range(8)]
    return layer.attend(queries(row), 1.0)[0, 0, 0].tolist()


def tokens(layer):
    """Tokens of the live entries, in the order of the list."""
    slots = layer.text[0, 0, : layer.text_len[0, 0]].long()
    return layer.keys[0, 0, slots].argmax(dim=-1).tolist()


PROMPT = [
    [1.0],
    [0.6, 0.4],
    [0.5, 0.1, 0.4],
    [0.2, 0.1, 0.5, 0.2],
    [0.3, 0.1, 0.1, 0.3, 0.2],
    [0.1, 0.1, 0.1, 0.1, 0.3, 0.3],
]


def test_h2o_on_six_tokens_by_hand():
    # Received by tokens 0 to 5: 2.7, 0.8, 1.1, 0.6, 0.5, 0.3. A third of six is two: 4 and 5 are recent, and of the others
    # 0 and 2 have received most.
    layer = prefilled(H2O(heavy=1 / 3, recent=1 / 3), PROMPT, RowSpans(6, []), 2)
    assert layer.keys.shape == (1, 1, 5, 8) and tokens(layer) == [0, 2, 4, 5]
    torch.testing.assert_close(layer.scores[0, 0, :4], torch.tensor([2.7, 1.1, 0.5, 0.3]))
    # Token 6 reads all that is there. 0, 2 and 4 have then received 2.8, 1.2 and 0.7; 5 and 6 are recent: 4 goes.
    read = step(layer, 6, {0: 0.1, 2: 0.1, 4: 0.2, 5: 0.2, 6: 0.4})
    assert read == pytest.approx([0.1, 0, 0.1, 0, 0.2, 0.2, 0.4, 0], abs=1e-6)
    assert tokens(layer) == [0, 2, 5, 6]
    torch.testing.assert_close(layer.scores[0, 0, :4], torch.tensor([2.8, 1.2, 0.5, 0.4]))
    # Token 7 takes the slot of token 4. 0, 2 and 5: 2.85, 1.25, 0.6. 5 goes; 6 was recent and comes to 1.0.
    slot = layer.text[0, 0, 4].item()
    assert layer.keys[0, 0, slot].argmax() == 4
    step(layer, 7, {0: 0.05, 2: 0.05, 5: 0.1, 6: 0.6, 7: 0.2})
    assert layer.keys[0, 0, slot].argmax() == 7 and tokens(layer) == [0, 2, 6, 7]
    torch.testing.assert_close(layer.scores[0, 0, :4], torch.tensor([2.85, 1.25, 1.0, 0.2]))


def test_of_equal_scores_the_earliest_stays():
    rows = [[1 / (i + 1)] * (i + 1) for i in range(6)]
    layer = prefilled(AVL(text_rule="direct", text_rate=0.5, text_minimum=0), rows, RowSpans(6, [(0, 0)]), 2)
    assert tokens(layer) == [0, 1, 2], "half of six"
    step(layer, 6, dict.fromkeys([0, 1, 2, 6], 0.25))
    assert tokens(layer) == [0, 1, 2, 6], "round(3.5) is 4"
    step(layer, 7, dict.fromkeys([0, 1, 2, 6, 7], 0.2))
    assert tokens(layer) == [0, 1, 2, 6], "of five that tie the last goes, the new one"


def test_vision_by_hand():
    # Image tokens 1 to 4; the last query's attention to them is 0.1, 0.3, 0.05, 0.2: 1 of 4 goes, the core is 2 of 4.
    rows = [[1 / (i + 1)] * (i + 1) for i in range(5)] + [[0.15, 0.1, 0.3, 0.05, 0.2, 0.2]]
    layer = prefilled(AVL(rate=0.25, compute_rate=0.5, interval=2), rows, RowSpans(6, [(1, 4)]), 2)
    assert layer.front_len.tolist() == [1] and layer.image_len.tolist() == [3] and layer.core_len.tolist() == [2]
    assert layer.keys[0, 0, :5].argmax(dim=-1).tolist() == [0, 1, 2, 4, 5], "in order, the minor entry 3 is gone"
    assert layer.core.tolist() == [[2, 3]], "slots of 2 and 4"
    read = step(layer, 6, {i: 0.2 for i in (0, 1, 2, 4, 5, 6)})
    assert read == pytest.approx([0.2, 0, 0.2, 0, 0.2, 0.2, 0.2, 0], abs=1e-6), "token 1 is secondary"
    layer.update_step = True
    read = step(layer, 7, {0: 0.1, 1: 0.3, 2: 0.05, 4: 0.15, 5: 0.1, 6: 0.1, 7: 0.2})
    assert read == pytest.approx([0.1, 0.3, 0.05, 0, 0.15, 0.1, 0.1, 0.2], abs=1e-6), "all that is stored"
    assert layer.core.tolist() == [[1, 3]] and layer.image.tolist() == [[1, 2, 3]]


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_of_a_prompt_by_hand():
    # The region is tokens 2 to 5.
    attention = RowAttention(queries(*PROMPT)[0], one_hot(*range(6))[0], 1.0)
    slots = torch.arange(2, 6)
    torch.testing.assert_close(Summed().start(attention, 1, slots), torch.tensor([[1.1, 0.6, 0.5, 0.3]]))
    torch.testing.assert_close(Latest().start(attention, 1, slots), torch.tensor([[0.1, 0.1, 0.3, 0.3]]))
    # Medians of what older tokens receive: from 3 0.5; from 4, of 0.1 and 0.3, 0.2; from 5, of 0.1, 0.1 and 0.3, 0.1.
    # 2: 0.4 + 0 - 0.1 + 0; 3: 0.2 + 0.1 + 0; 4: 0.2 + 0.2; 5: 0.3.
    want = torch.tensor([[0.3, 0.3, 0.4, 0.3]])
    torch.testing.assert_close(Centred(0.5).start(attention, 1, slots), want)


@pytest.mark.parametrize("scorer", [Summed(), Latest()], ids=repr)
@pytest.mark.parametrize("chunk", [1, 2**24])
def test_a_step_scores_as_a_longer_prompt_would(scorer, chunk):
    """Grouped heads, random attention: prefill of n + 1 entries, and prefill of n and one step."""
    torch.manual_seed(0)
    query, key, slots = torch.randn(6, 12, 4), torch.randn(3, 12, 4), torch.tensor([0, 3, 4, 7, 8, 11])
    whole = RowAttention(query, key, 0.5, chunk)
    want = scorer.start(whole, 3, slots)
    scores = torch.zeros(1, 3, 8)
    scores[0, :, :5] = scorer.start(RowAttention(query[:, :11], key[:, :11], 0.5, chunk), 3, slots[:5])
    ((_, row),) = whole.chunks(torch.tensor([11]))
    paid = torch.full((1, 3, 8), 7.0)  # what lies behind the live entries is anything
    paid[0, :, :6] = row[:, 0, slots].view(3, 2, 6).sum(dim=1)
    text, counts = torch.arange(8, dtype=torch.int32).repeat(1, 3, 1), torch.full((1, 3), 6, dtype=torch.int32)
    room = torch.full((1, 2), 100, dtype=torch.int32)  # nothing is evicted
    rule, quantile = scorer.kernel_rule
    evict(scores, paid, text, counts, room, room, torch.ones(1, dtype=torch.long), rule=rule, quantile=quantile)
    torch.testing.assert_close(scores[0, :, :6], want)
    assert (counts == 6).all() and (text == torch.arange(8)).all()
    assert scorer.start(whole, 3, slots[:0]).shape == (3, 0), "a prompt that ends with its image"


def test_history_of_a_decode_step_by_hand():
    """In a decode step the quantile is taken over all entries of the region, the step's own included."""
    # Token 1 is the image. Tokens 2 to 4 start at 0.3, 0.3 and 0.2; three may stay, one of them is recent.
    policy = AVL(text_rule="history", text_rate=0.5, text_minimum=3)
    layer = prefilled(policy, PROMPT[:5], RowSpans(5, [(1, 1)]), 2)
    torch.testing.assert_close(layer.scores[0, 0, :3], torch.tensor([0.3, 0.3, 0.2]))
    # The median of 0, 0.1, 0.3 and 0.6 is 0.2: 2 to 4 come to 0.1, 0.2 and 0.3.
    step(layer, 5, {2: 0, 3: 0.1, 4: 0.3, 5: 0.6})
    assert tokens(layer) == [3, 4, 5]
    torch.testing.assert_close(layer.scores[0, 0, :3], torch.tensor([0.2, 0.3, 0.6]))
    # The median of 0.5, 0.3, 0.05 and 0.15 is 0.225: 3 to 5 come to 0.475, 0.375 and 0.425. Over the older entries alone
    # the medians were 0.1 and 0.3, and 5 would go: 0.5, 0.4 and 0.35.
    step(layer, 6, {3: 0.5, 4: 0.3, 5: 0.05, 6: 0.15})
    assert tokens(layer) == [3, 5, 6]
    torch.testing.assert_close(layer.scores[0, 0, :3], torch.tensor([0.475, 0.425, 0.15]))


# --- counts ----------------------------------------------------------------------------------------------------------


def test_budgets():
    published = AdaVConfig(**text("h2o", minimum=8)).make_cache_policy()
    # 25 text tokens of the prompt: 60 % are 15, 70 % of which are heavy. 26: 15.6.
    assert published.budget(25, 25) == Budget(15, 5) and published.budget(25, 26) == Budget(16, 5)
    assert published.budget(25, 4) == Budget(8, 3), "a minimum"
    assert AdaVConfig(**text("history")).make_cache_policy().budget(25, 25) == Budget(15, 7)
    assert AdaVConfig(**text("direct")).make_cache_policy().budget(25, 25) == Budget(15, 0)
    assert H2O().budget(96, 96) == Budget(48, 36) and H2O().budget(96, 119) == Budget(58, 44)
    assert H2O(0.1, 0.2).budget(96, 96) == H2O(0.1, 0.2).budget(96, 500) == Budget(28, 19)


def test_plans_by_hand():
    counts = Counts(before=7, image=64, after=25, entered=64)
    plan = Full().plan(counts)
    assert [plan.stored(s) for s in (0, 5)] == [96, 101] and plan.read(1) == 97 and plan.slots(24) == 120
    plan = AdaVConfig(**vision(0.5, 0.7, 3), **text("h2o", minimum=8)).make_cache_policy().plan(counts)
    assert (plan.front, plan.image, plan.core, plan.prompt) == (7, 32, 19, 25)
    # Text: 15 after prefill, 16 after a step (60 % of 26 are 15.6), 29 after 24 (of 49).
    assert [plan.text(s) for s in (0, 1, 2, 24)] == [15, 16, 16, 29]
    assert plan.stored() == 54 and plan.stored(24) == 68
    assert [plan.read(s) for s in (1, 2, 3)] == [7 + 19 + 16, 7 + 19 + 17, 7 + 32 + 17]
    assert plan.slots(24) == 7 + 32 + 30 and plan.slots(0) == 54
    # No core: what stays of the image is read like the text before it.
    plan = AdaVConfig(**vision(0.6, 0.8, -1)).make_cache_policy().plan(counts)
    assert (plan.front, plan.image, plan.read(3)) == (32, 0, 32 + 28)
    # Shares are of what entered the LLM; a layer that holds less keeps what it holds.
    plan = AdaVConfig(**vision(0.5, 0.7, 3)).make_cache_policy().plan(counts._replace(image=20))
    assert (plan.image, plan.core) == (20, 19)
    plan = H2O().plan(counts)
    assert plan.front == plan.image == 0 and plan.stored() == 48 and plan.stored(23) == 58


def test_counts_do_not_lose_one_to_floating_point():
    assert AVL(rate=0.9, compute_rate=0.9).image(30, 30) == (3, 3), "0.1 * 30 is 2.9999999999999996"
    assert PrefillFilter(layer=1, rate=0.9).explicit(30, 4) == (Cut(0, 3),)
    assert PrefillFilter(layer=1, rate=0.9).explicit(3, 4) == (Cut(0, 1),), "one stays"
    assert PrefillFilter(layer=1, rate=0.0).explicit(30, 4) == ()


# --- the configuration -----------------------------------------------------------------------------------------------


def test_switches_pick_the_policy():
    assert isinstance(AdaVConfig().make_cache_policy(), Full) and isinstance(AdaVConfig(**FILTER).make_cache_policy(), Full)
    assert AdaVConfig(**vision(0.5, 0.7, 3)).make_cache_policy() == AVL(rate=0.5, compute_rate=0.7, interval=3)
    text_alone = AdaVConfig(**text("history", minimum=5), text_heavy_share=0.6).make_cache_policy()
    assert text_alone == AVL(text_rule="history", text_rate=0.4, text_minimum=5, heavy=0.6)
    assert AdaVConfig(all_use_h2o=True, **vision(0.5, 0.7, 3)).make_cache_policy() == H2O(), "in place of A-VL"
    assert AdaVConfig(h2o_heavy_share=0.1, h2o_recent_share=0.2).make_cache_policy() == H2O(0.1, 0.2)


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"all_use_h2o": True, "h2o_heavy_share": 0.1, "h2o_recent_share": 0.1}, '"all_use_h2o" is true and'),
        ({"method": "fastv", **FILTER}, '"prefill_filter_flag" is true, but method "fastv" drops tokens inside'),
    ],
)
def test_switches_that_do_not_go_together(keys, words):
    with pytest.raises(ConfigError, match=words):
        AdaVConfig(**keys)


def test_the_filters_layer_is_checked_before_weights_are_loaded(tmp_path):
    save_llava_hf(build_reference("llava"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match='"prefill_filter_layer" is 3, but the LLM has 3 layers, so at most 2'):
        load_pretrained_model(tmp_path, config=AdaVConfig(**FILTER | {"prefill_filter_layer": 3}), device_map="cpu")
