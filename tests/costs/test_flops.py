"""The count of FLOPs and KV bytes: hand-worked, against torch's flop counter, and against the cache of a real prefill."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from tiny_checkpoints import build_reference, save_clip_tower, save_llava_hf, save_original, write_json
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.constants import IMAGE_TOKEN_INDEX
from llava.costs import flops
from llava.costs.flops import Cost, allocated_kv_bytes, decode, language_model, predict, vision
from llava.costs.measure import kv_bytes, predicted
from llava.costs.method_costs import DROPPER_COSTS, SELECTOR_COSTS
from llava.costs.model_shape import ImageCounts, ModelShape, read_config
from llava.eval.runs.run_summary import summarise
from llava.methods.before_llm import SELECTORS
from llava.methods.inside_llm import DROPPERS
from llava.methods.kv_cache.base import Counts
from llava.methods.kv_cache.full import Full
from llava.mm_utils import TilePlan, left_pad, tile_plan
from llava.model.builder import load_pretrained_model
from llava.model.decoding.engine import Engine
from llava.model.decoding.sampling import Sampling

# 2 x 2 patches of 1 pixel, one head of 3 in a tower of one layer; an LLM of two layers with 2 query heads of 2 on 1 KV
# head.
HAND = ModelShape(
    tower_layers=1,
    tower_width=3,
    tower_mlp=5,
    tower_heads=1,
    patch=1,
    side=2,
    projector=(3, 4, 4),
    layers=2,
    width=4,
    mlp=6,
    heads=2,
    kv_heads=1,
    head=2,
    vocab=10,
)


def everything(*entries):
    """Plans of layers that keep so many entries."""
    return tuple(Full().plan(Counts(before=n, image=0, after=0, entered=0)) for n in entries)


def test_the_tower_by_hand():
    # A tile: 4 patches of 3 x 1 x 1 pixels to width 3: 2 * 4 * 3 * 3 = 72. One layer over 5 tokens: q, k, v and output
    # 4 * (2 * 5 * 3 * 3 = 90) = 360; scores 2 * 5 * 3 * 5 = 150 and as much for the weighted sum = 300; MLP
    # 2 * (2 * 5 * 3 * 5 = 150) = 300. Together 72 + 960 = 1032.
    # The [CLS] row once more: 2 * 1 * 3 * 5 = 30. Projector over 4 patches: 2 * 4 * 3 * 4 = 96, and 2 * 4 * 4 * 4 = 128.
    assert vision(HAND, 1, 4) == {"vision_tower": 1032, "cls_row": 30, "projector": 224}
    assert vision(HAND, 3, 6) == {"vision_tower": 3 * 1032, "cls_row": 90, "projector": 336}
    assert set(vision(HAND, 0, 0).values()) == {0}


def test_the_language_model_by_hand():
    # 3 text tokens; layer 0 sees 2 image tokens and sends 1 of them on to its MLP, layer 1 sees 1.
    # Layer 0, 5 tokens: q 2 * 5 * 4 * 4 = 160, k and v 2 * (2 * 5 * 4 * 2 = 80) = 160, output 160; attention of 2 heads
    #   of 2: scores 2 * 5 * 4 * 5 = 200, weighted sum 200; MLP of 4 tokens 3 * (2 * 4 * 4 * 6 = 192) = 576.
    # Layer 1, 4 tokens: 128 + 128 + 128; attention 2 * (2 * 4 * 4 * 4 = 128) = 256; MLP 576.
    # Head for the last position: 2 * 1 * 4 * 10 = 80.
    seen = [(2, 1), (1, 1)]
    parts = {"projections": 480 + 384, "attention": 400 + 256, "mlp": 576 + 576, "lm_head": 80}
    assert language_model(HAND, 3, seen) == parts
    assert language_model(HAND, 3, seen, logits=5) == parts | {"lm_head": 400}
    with pytest.raises(ValueError, match="3 layers for an LLM of 2"):
        language_model(HAND, 3, [(2, 2)] * 3)


def test_a_decode_step_by_hand():
    # The new token reads 5 and 4 cached entries, and itself. Projections 2 * (32 + 32 + 32) = 192; attention
    # 2 * (2 * 1 * 4 * 6 = 48) = 96 and 2 * (2 * 1 * 4 * 5 = 40) = 80; MLP 2 * (3 * 48 = 144) = 288; head 80.
    assert decode(HAND, [5, 4]) == {"projections": 192, "attention": 176, "mlp": 288, "lm_head": 80}
    cost = Cost(HAND, parts={"mlp": 1, "lm_head": 2}, plans=everything(5, 4), layer_mean=1.5)
    assert cost.total == 3 and cost.decode() == decode(HAND, [5, 4]) and cost.decode(3) == decode(HAND, [7, 6])


def test_kv_bytes_by_hand():
    # An entry: keys and values of 1 KV head of 2 in 2 bytes = 8. (5 + 4) entries = 72; 3 steps add 2 * 3 entries = 48.
    cost = Cost(HAND, parts={}, plans=everything(5, 4), layer_mean=1.5)
    assert cost.kv_bytes(2) == 72 and cost.kv_bytes(2, steps=3) == 120 and cost.kv_bytes(4) == 144
    # Beside a row of (3, 6): layer 0 is 5 long for both, layer 1 is 6: 2 * 11 entries = 176.
    other = dataclasses.replace(cost, plans=everything(3, 6))
    assert allocated_kv_bytes([cost, other], 2) == 176 and allocated_kv_bytes([cost, other], 2, steps=1) == 208


def test_an_image_before_selection():
    # 112 x 40 pixels on a canvas of two tiles of 4 x 4 patches, 8 x 4 patches in all: 40 * 8 / 112 = 2.86 -> 2 of its
    # rows are image, 4 + 4 patches each, and each ends with a newline token.
    plan = TilePlan((112, 40), 56, (2, 1), (112, 56), (112, 40), (0, 8), merge="spatial_unpad")
    counts = ImageCounts.from_plan(plan, 4)
    assert counts == ImageCounts(patches=(16, 8, 8), newlines=2, newlines_alone=1)
    assert counts.candidates == 32 and counts.tokens == 34
    assert [counts.kept(budget) for budget in (1, 31, 32, 99)] == [1, 31, 34, 34]
    with pytest.raises(UserError, match="budget is 0"):
        counts.kept(0)


# ------------------------------------------------------------------------------------- against torch's flop counter
SIDE = 168  # a tile of 12 x 12 patches: sequences so long that attention matters
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
BUDGET = 500  # of 624 patches, so that attention still matters after selection
MODELS = {
    "llama": ("llava_next", "llama", {}),
    "grouped llama": ("llava_next", "llama", {"num_key_value_heads": 1}),
    "mistral": ("llava_next", "mistral", {}),
}
PINPOINTS = [[SIDE * h, SIDE * w] for h, w in ((1, 2), (2, 1), (2, 2))]
ROWS = ([1, 9, IMAGE_TOKEN_INDEX, 10, 11, 12], [1, IMAGE_TOKEN_INDEX, 8, IMAGE_TOKEN_INDEX, 7, 6, 5], [1, 20, 21])
SIZES = [(300, 250), (290, 150), (160, 330)]  # of the rows' three images; unpadding takes something of each


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    kind, text, options = MODELS[request.param]
    folder = tmp_path_factory.mktemp("model")
    save_llava_hf(
        build_reference(kind, text, side=SIDE, vision=TOWER, pinpoints=PINPOINTS, **options), folder, processor=False
    )
    return load_pretrained_model(folder, device_map="cpu")[1]


def inputs(model, rows, sizes):
    """A left-padded batch of `rows` whose images have `sizes`, of noise."""
    generator = torch.Generator().manual_seed(0)
    plans = [tile_plan(size, model.config) for size in sizes]
    images = [torch.randn(plan.tiles, 3, plan.tile_size, plan.tile_size, generator=generator) for plan in plans]
    ids, mask = left_pad([torch.tensor(row) for row in rows], 3)
    return {"input_ids": ids, "attention_mask": mask, "images": images or None, "image_sizes": sizes or None}


def counts(model, sizes):
    shape = ModelShape.from_config(model.config)
    return [ImageCounts.from_plan(tile_plan(size, model.config), shape.side) for size in sizes]


def counted(model, function) -> list[int]:
    """FLOPs by torch's counter, one number for each forward pass of the model. What is computed between two passes counts
    to the later one, so that the first number includes the vision tower. Nothing may be computed after the last.

    Under the MATH backend, since the counter counts nothing for SDPA's fused kernel on the CPU. Rotation angles, position
    times frequency, are left out: some versions of transformers make them by a matrix product, which the counter sees,
    and some by an elementwise one, which it does not.
    """
    totals = [0]

    def so_far(*_):
        by_module = counter.get_flop_counts()
        angles = [name for name in by_module if name.endswith(("rotary_emb", "RotaryEmbedding"))]
        totals.append(counter.get_total_flops() - sum(sum(by_module[name].values()) for name in angles))

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        handle = model.register_forward_hook(so_far)
        try:
            function()
        finally:
            handle.remove()
    so_far()
    assert totals.pop() == totals[-1]
    return [after - before for before, after in pairwise(totals)]


def agrees(measured: int, cost: Cost, attention: float = 0.2, exact: bool = True) -> None:
    assert cost.parts["attention"] >= attention * cost.total, "attention must matter for this to be a test"
    assert abs(measured - cost.total) <= 0.01 * measured
    # Nothing is left out, so it is even exact.
    assert not exact or measured == cost.total


@pytest.mark.filterwarnings("ignore:no FitPrune table was fitted")
@pytest.mark.parametrize("method", [*SELECTORS, *DROPPERS])
def test_prefill_agrees_with_torchs_counter(model, method):
    # Where the first layers see every token, attention matters even if few are left in the end.
    config = AdaVConfig(method=method, overall_tokens=BUDGET // 5 if method in DROPPERS else BUDGET)
    batch = inputs(model, ROWS[:1], SIZES[:1])
    cost = predict(ModelShape.from_config(model.config), config, counts(model, SIZES[:1]), text_tokens=5, words=[3])
    (measured,) = counted(model, lambda: model.generate(**batch, config=config, max_new_tokens=1, do_sample=False))
    # How much of a coverage is brought up to date, and how many words are raters, depends on the sample.
    exact = method not in ("scope", "mmtok", "adav_cover", "sparsevlm")
    agrees(measured, cost, 0.0 if method == "no_image" else 0.2, exact)


def test_both_stages_of_apet_agree_with_torchs_counter(model):
    config, batch = (
        AdaVConfig(method="apet", overall_tokens=BUDGET, options={"second_stage": True}),
        inputs(model, ROWS[1:2], SIZES[1:]),
    )
    cost = predict(ModelShape.from_config(model.config), config, counts(model, SIZES[1:]), text_tokens=5, words=[4, 3])
    first = predict(cost.shape, config.replaced(options={}), counts(model, SIZES[1:]), text_tokens=5, words=[4, 3])
    (measured,) = counted(model, lambda: model.generate(**batch, config=config, max_new_tokens=1, do_sample=False))
    agrees(measured, cost)
    assert cost.parts["method"] > first.parts["method"] and cost.parts["mlp"] < first.parts["mlp"]


@pytest.mark.parametrize(
    "method, options",
    [
        ("adav_zoom", {"crops": 0}),
        ("adav_zoom", {"crops": 1}),
        ("adav_zoom", {"crop_share": 0.3}),
        ("fastervlm", {"crops": 1}),
        ("visionzip", {"crops": 1}),
    ],
    ids=str,
)
def test_crops_that_are_not_encoded_cost_nothing(model, method, options):
    """Counted after the fact from the tiles that were encoded, and before it where the number of crops is known."""
    # Fewer tokens than tile 0 has patches: otherwise the budget would ask for further crops.
    config = AdaVConfig(method=method, overall_tokens=BUDGET // 5, options=options)
    batch, images, prepared = inputs(model, ROWS[1:2], SIZES[1:]), counts(model, SIZES[1:]), []
    shape = ModelShape.from_config(model.config)

    def run():
        prepared.append(model.prepare(**batch, config=config))
        model.generate(prepared=prepared[0], max_new_tokens=1, do_sample=False)

    (measured,) = counted(model, run)
    (cost,) = predicted(prepared[0], images, shape, config)
    agrees(measured, cost, 0.0)
    before = predict(shape, config, images, text_tokens=5, words=[4, 3])
    whole = predict(shape, AdaVConfig(method="none"), images, text_tokens=5, words=[4, 3])
    tiles = [len(selection.tiles) for selection in prepared[0].selections[0]]
    assert cost.parts["vision_tower"] / sum(tiles) == whole.parts["vision_tower"] / sum(len(i.patches) for i in images)
    if "crops" in options:
        assert tiles == [1 + options["crops"]] * 2 and before.parts["vision_tower"] == cost.parts["vision_tower"]
        assert abs(before.total - cost.total) <= 0.02 * cost.total


def test_crops_by_hand():
    # Tiles of 4, 4, 2 and 4 patches and three newline tokens. With one crop, the largest one comes first.
    image = ImageCounts((4, 4, 2, 4), 3)
    assert image.of_tiles((0, 2)) == ImageCounts((4, 2), 0) and image.of_tiles((0, 1, 2, 3)) == image
    config = AdaVConfig(method="adav_zoom", overall_tokens=3, options={"crops": 1})
    cost = predict(HAND, config, [image], text_tokens=5, words=[3])
    assert cost.parts["vision_tower"] == vision(HAND, 2, 0)["vision_tower"]
    assert cost.parts["projector"] == HAND.projected(8) and cost.layer_mean == 3
    # The ranking: 3 crops x 4 patches, and the cosines of 3 words and 4 patches of width 4. The choice: 8 patches.
    assert cost.parts["method"] == 2 * 3 * 4 + 2 * 3 * 4 * 4 + 2 * 3 * 4 * 8
    # Nine tokens need a third tile. A budget of all patches encodes all tiles, and ranks and chooses nothing.
    more, every = (predict(HAND, config.replaced(overall_tokens=k), [image], 5, [3]) for k in (9, 14))
    assert more.parts["vision_tower"] == vision(HAND, 3, 0)["vision_tower"]
    assert every == predict(HAND, AdaVConfig(method="none"), [image], 5, [3])


@pytest.mark.filterwarnings("ignore:no FitPrune table was fitted")
@pytest.mark.parametrize("method", DROPPERS)
def test_dropping_from_two_images_agrees_with_torchs_counter(model, method):
    config, batch = AdaVConfig(method=method, overall_tokens=BUDGET // 10), inputs(model, ROWS[1:2], SIZES[1:])
    cost = predict(ModelShape.from_config(model.config), config, counts(model, SIZES[1:]), text_tokens=5, words=[4, 3])
    (measured,) = counted(model, lambda: model.generate(**batch, config=config, max_new_tokens=1, do_sample=False))
    agrees(measured, cost, exact=method != "sparsevlm")


def test_two_images_and_all_logits_agree_with_torchs_counter(model, monkeypatch):
    config, images = AdaVConfig(method="t2i", overall_tokens=BUDGET // 2), counts(model, SIZES[1:])
    batch = inputs(model, ROWS[1:2], SIZES[1:])
    shape = ModelShape.from_config(model.config)
    cost = predict(shape, config, images, text_tokens=5, words=[4, 3])
    (measured,) = counted(model, lambda: model.generate(**batch, config=config, max_new_tokens=1, do_sample=False))
    agrees(measured, cost)
    # forward(), as in training, gives the logits of all positions.
    monkeypatch.setattr(model, "adav_config", config)
    cost = predict(shape, config, images, text_tokens=5, words=[4, 3], logits=cost.cached[0])
    (measured,) = counted(model, lambda: model(**batch))
    agrees(measured, cost)


@pytest.mark.filterwarnings("ignore:no FitPrune table was fitted")
@pytest.mark.parametrize("method", ["cls", *DROPPERS])
def test_decode_agrees_with_torchs_counter(model, method):
    config, batch = AdaVConfig(method=method, overall_tokens=BUDGET), inputs(model, ROWS[:1], SIZES[:1])
    cost = predict(ModelShape.from_config(model.config), config, counts(model, SIZES[:1]), text_tokens=5, words=[3])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    # The first new token comes out of prefill: three tokens are prefill and two steps.
    _, *measured = counted(model, lambda: model.generate(**batch, config=config, **options))
    steps = [cost.decode(step) for step in (1, 2)]
    assert measured == [sum(step.values()) for step in steps]
    assert steps[0]["attention"] >= 0.2 * sum(steps[0].values())


def test_a_budget_that_keeps_everything_asks_no_method(model):
    shape, (image,) = ModelShape.from_config(model.config), counts(model, SIZES[:1])
    plain, everything = (
        predict(shape, config, [image], 5, [3])
        for config in (AdaVConfig(method="none"), AdaVConfig(method="adav", overall_tokens=image.candidates))
    )
    assert everything == plain and plain.layer_mean == image.tokens > image.candidates and not plain.elements


def test_every_method_has_an_entry():
    assert set(SELECTORS) == set(SELECTOR_COSTS) and set(DROPPERS) == set(DROPPER_COSTS)


# ------------------------------------------------------------------------------------------ against a real KV cache
@pytest.mark.filterwarnings("ignore:no FitPrune table was fitted")
@pytest.mark.parametrize("method", ["none", "no_image", "random", "fastervlm", "adav", *DROPPERS])
def test_kv_bytes_are_those_of_the_cache(model, method):
    config, shape = AdaVConfig(method=method, overall_tokens=50), ModelShape.from_config(model.config)

    def prefill(rows, sizes):
        prepared = model.prepare(**inputs(model, rows, sizes), config=config)
        cache = Engine(model).generate(prepared, Sampling(max_new_tokens=1)).cache
        costs = predicted(prepared, counts(model, sizes), shape, config)
        return costs, cache, kv_bytes(cache, costs, [1] * len(rows))

    def occupied(cache):
        return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))

    alone = [prefill(ROWS[:1], SIZES[:1]), prefill(ROWS[1:2], SIZES[1:]), prefill(ROWS[2:], [])]
    for costs, cache, (measured,) in alone:
        assert occupied(cache) == costs[0].kv_bytes(4) == measured["kv_bytes_allocated"] == measured["kv_bytes_live"]
        assert tuple(layer.keys.shape[-2] for layer in cache.layers) == costs[0].cached
    assert alone[2][0][0].cached == (3,) * shape.layers, "the row without image"
    costs, cache, measured = prefill(ROWS, SIZES)
    assert costs == [cost for (cost,), _, _ in alone], "what a row costs does not depend on its batch"
    assert occupied(cache) == allocated_kv_bytes(costs, 4)
    assert [row["kv_bytes_live"] for row in measured] == [cost.kv_bytes(4) for cost in costs]
    assert [row["kv_bytes_predicted"] for row in measured] == [cost.kv_bytes(4) for cost in costs]
    padded = occupied(cache) - sum(cost.kv_bytes(4) for cost in costs)
    assert padded > 0, "rows of different length"


# ------------------------------------------------------------------------------------- from a config.json, and shown
PUBLISHED_7B = {
    "model_type": "llava",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "mm_hidden_size": 1024,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
}
PUBLISHED_34B = PUBLISHED_7B | {
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_hidden_layers": 60,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "vocab_size": 64000,
}


def test_a_config_json_is_enough(tmp_path):
    write_json(tmp_path / "config.json", PUBLISHED_7B)
    shape = ModelShape.from_config(read_config(tmp_path))
    assert (shape.tower_layers, shape.tower_width, shape.tower_mlp, shape.side) == (23, 1024, 4096, 24)
    assert shape.projector == (1024, 4096, 4096) and shape.head == 128
    assert shape.layers * shape.kv_entry(2) == 2**19, "half a MiB per token in half precision"
    write_json(tmp_path / "config.json", PUBLISHED_34B)
    grouped = ModelShape.from_config(read_config(tmp_path))
    assert grouped.layers * grouped.kv_entry(2) == 60 * 2 * 8 * 128 * 2
    with pytest.raises(UserError, match="no config.json"):
        read_config(tmp_path.parent)


def test_both_formats_have_one_shape(tmp_path):
    source = build_reference("llava", num_key_value_heads=2)
    hf = save_llava_hf(source, tmp_path / "hf")
    original = save_original(source, tmp_path / "original", save_clip_tower(source, tmp_path / "tower"))
    shapes = {ModelShape.from_config(read_config(folder)) for folder in (hf, original)}
    shapes |= {
        ModelShape.from_config(load_pretrained_model(folder, device_map="cpu")[1].config) for folder in (hf, original)
    }
    assert len(shapes) == 1 and shapes.pop().kv_heads == 2


def test_the_command_prints_the_parts(tmp_path, capsys):
    write_json(tmp_path / "config.json", PUBLISHED_7B)
    arguments = [str(tmp_path), "--method", "adav", "--overall-tokens", "144", "--text-tokens", "80"]
    flops.main([*arguments, "--image-size", "672", "672"])
    out = capsys.readouterr().out
    # 5 tiles of 576 patches and 48 newline tokens; 144 + 80 cached tokens of half a MiB.
    assert "2,928 vision tokens of 5 tiles -> 144.0" in out and "117.4 MB" in out
    # The projections of one layer: (144 + 80) tokens x 4 matrices of 4096 x 4096 x 2 FLOPs, times 32 layers.
    assert f"{224 * 4 * 2 * 4096**2 * 32 / 1e9:,.3f}" in out
    assert "softmax over 115,200 elements" in out, "40 words x 2,880 patches"
    with pytest.raises(SystemExit):
        flops.main([*arguments, "--question-tokens", "81"])
    assert "--question-tokens is 81, allowed is 0 to the 80" in capsys.readouterr().err


def test_rows_of_an_earlier_version_are_told_apart():
    row = {
        "total": [16],
        "kept": [4],
        "new_tokens": 1,
        "conversation": "plain",
        "seconds": {},
        **dict.fromkeys(("kv_bytes_live", "kv_bytes_allocated", "kv_bytes_predicted"), 8),
    }
    report = summarise([row, row | {"prefill_flops": 50}])
    assert report["prefill_flops_predicted"] == {"mean": 50, "questions": 1} and report["answered"] == 2
