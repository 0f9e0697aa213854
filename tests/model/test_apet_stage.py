"""The second stage of ApET inside the LLM: its rule by plain loops, its counts, and a plain recomputation of the LLM."""

import pytest
import torch
from apet_reference import naive_apet, one_tile
from dropping_cases import GREEDY, IMAGE, LAYERS, config, greedy
from dropping_reference import recompute
from tiny_checkpoints import build_reference, make_image, save_llava_hf

from llava.common.errors import UserError
from llava.config import AdaVConfig, ConfigError
from llava.methods.inside_llm.apet_stage import ApETStage
from llava.mm_utils import left_pad, process_images
from llava.model.builder import load_pretrained_model

TOKENS = 36  # of an image before the cut, if it has as many
AFTER = LAYERS // 2 - 1  # the layer of the cut, from 0
PROMPTS = [[1, 9, 8, IMAGE, 10, 11, 12], [1, IMAGE, 13, 7, IMAGE, 20, 21], [1, 9, 8], [1, 7, 9, IMAGE]]
SIZES = [(97, 61), (60, 60), (31, 90), (57, 57)]
IMAGES = [slice(0, 1), slice(1, 3), slice(3, 3), slice(3, 4)]


@pytest.fixture(scope="module")
def prepare(tmp_path_factory):
    """The model, and prepare() of some of the four rows with both stages. The last image ends its prompt."""
    folder = tmp_path_factory.mktemp("apet")
    save_llava_hf(build_reference("llava_next", seed=3, num_hidden_layers=LAYERS), folder)
    _, model, processor, _ = load_pretrained_model(folder, device_map="cpu")
    pixels = process_images([make_image(*size, seed=i) for i, size in enumerate(SIZES)], processor, model.config)

    def some(rows=range(4), tokens=TOKENS, **options):
        ids, mask = left_pad([torch.tensor(PROMPTS[row]) for row in rows], 3)
        chosen = [i for row in rows for i in range(4)[IMAGES[row]]]
        return model.prepare(
            input_ids=ids,
            attention_mask=mask,
            images=[pixels[i] for i in chosen] or None,
            image_sizes=[SIZES[i] for i in chosen] or None,
            config=config("apet", tokens, **{"second_stage": True} | options),
        )

    return model, some


def test_plans_by_hand():
    """The published pairs, after 16 of 32 layers: 10 basis tokens, and the rest of a third are merged."""
    cuts = [ApETStage().cuts(n, 576, 32) for n in (96, 192, 288)]
    assert cuts == [((15, 10, 22),), ((15, 10, 54),), ((15, 10, 86),)]
    assert ApETStage().cuts(2, 1, 8) == ((3, 1, 0),) and ApETStage().cuts(1, 1, 8) == ()
    assert [seen.attention for seen in ApETStage().schedule(96, 96, 32)] == [96] * 16 + [32] * 16
    assert ApETStage().cuts(9, 9, 2) == ((0, 1, 2),)


def test_equals_the_naive_rule(prepare):
    model, some = prepare
    prepared = some()
    greedy(model, prepared)
    for row, length in enumerate(prepared.lengths):
        found = []
        hook = model.model.layers[AFTER].register_forward_hook(lambda *args, found=found: found.append(args[2]))
        with torch.no_grad():
            model.model(inputs_embeds=prepared.inputs_embeds[row : row + 1, -length:], use_cache=False)
        hook.remove()
        for image, (start, count) in enumerate(prepared.dropping.prompts[row].images):
            ends = start + count == length
            states = found[0][0, start : start + count]
            kept, _, sources = naive_apet(one_tile(states), count // 3, start=count - 1 if ends else None)
            (record,) = prepared.dropping.records[row][image]
            assert prepared.dropping.survivors(row, image)[-1].tolist() == kept
            assert record.layer == AFTER and sorted(record.sources) == sorted(sources)
            # Merged tokens are numbered in the order of their places.
            assert [n for n in record.order.tolist() if n >= count] == list(range(count, count + len(sources)))
            assert row != 3 or kept[-1] == count - 1, "the slot that the answer is read from stays"


def test_cached_decoding_equals_recomputation(prepare):
    model, some = prepare
    together = some()
    tokens, logits, _ = greedy(model, together)
    for row in range(4):
        alone = some([row])
        own, own_logits, _ = greedy(model, alone)
        assert torch.equal(own[0], tokens[row])
        torch.testing.assert_close(own_logits[0], logits[row], atol=1e-4, rtol=0)
        prompt = alone.inputs_embeds[0]
        want, keys = recompute(model, prompt, alone.dropping, 0, own[0].tolist())
        torch.testing.assert_close(own_logits[0], want[:-1], atol=1e-4, rtol=0)
        assert [key.shape[1] for key in keys] == alone.dropping.cached(0)
        gone = sum(count - count // 3 for _, count in alone.dropping.prompts[0].images)
        assert keys[0].shape[1] - keys[-1].shape[1] == gone


def test_the_first_stage_is_as_without_it(prepare):
    _, some = prepare
    both, first = some(), some(second_stage=False)
    assert first.dropping is None and torch.equal(first.inputs_embeds, both.inputs_embeds)


def test_other_requests(prepare):
    """Beams repeat rows, and one token cannot be cut."""
    model, some = prepare
    beams = model.generate(prepared=some([0]), **GREEDY | {"num_beams": 2})
    assert beams.shape == (1, GREEDY["max_new_tokens"])
    assert some([0], tokens=1).dropping.cuts == [[()]]


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"options": {"second_stage": 1}}, '"options.second_stage" is 1, allowed is true or false'),
        ({"options": {"second_stage": True, "compat": "public"}}, "does not reproduce the public code"),
        ({"options": {"second_stage": True}, "prefill_filter_flag": True}, "both drop tokens inside the LLM"),
    ],
)
def test_settings_that_do_not_go_together(keys, words):
    with pytest.raises(ConfigError, match=words):
        AdaVConfig(method="apet", **keys)


def test_a_file_may_hold_options_of_other_methods():
    config = AdaVConfig(method="adav", prefill_filter_flag=True, options={"second_stage": True, "compat": "public"})
    assert config.unused_options() == ["second_stage"]
    assert AdaVConfig(method="adav", options={"second_stage": True}).make_dropper() is None


def test_one_layer_is_not_enough(tmp_path):
    save_llava_hf(build_reference("llava", num_hidden_layers=1), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match='"options.second_stage" is true, but the LLM has 1 layer'):
        load_pretrained_model(tmp_path, config=config("apet", second_stage=True), device_map="cpu")
