"""What a cache policy costs and saves, as predicted: against torch's flop counter, the cache itself, and a shard's rows."""

import json
import threading
from dataclasses import replace

import pytest
from cache_cases import CASES, setting
from eval_data import make_vqav2
from test_flops import IMAGE_TOKEN_INDEX, counted, counts, inputs
from tiny_checkpoints import build_reference, save_llava_hf

from llava.common.find_checkpoint import find_checkpoint
from llava.costs import flops
from llava.costs.flops import allocated_kv_bytes, predict
from llava.costs.measure import kv_bytes, predicted
from llava.costs.model_shape import ModelShape
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.runs.answer_shard import ShardAnswerer
from llava.eval.runs.run import Run
from llava.eval.runs.run_summary import summarise
from llava.eval.runs.work_order import Generation
from llava.model.builder import load_pretrained_model
from llava.model.decoding.engine import Engine
from llava.model.decoding.sampling import Sampling

FRONTS = ["none", "adav", "filter", "fastv"]
ROWS = ([1, 9, IMAGE_TOKEN_INDEX, 10, 11, 12], [1, IMAGE_TOKEN_INDEX, 8, IMAGE_TOKEN_INDEX, 7, 6, 5], [1, 20, 21])
SIDE = 84  # a tile of 6 x 6 patches
SIZES = [(150, 125), (145, 75), (80, 165)]  # of the rows' three images; unpadding takes something of each
BUDGET = 50  # of 156, 78 and 78 patches
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pinpoints = [[SIDE * h, SIDE * w] for h, w in ((1, 2), (2, 1), (2, 2))]
    source = build_reference("llava_next", side=SIDE, pinpoints=pinpoints, num_key_value_heads=2)
    save_llava_hf(source, folder, processor=False)
    return load_pretrained_model(folder, device_map="cpu")[1]


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("case", CASES)
def test_flops_agree_with_torchs_counter(model, case, front):
    config = setting(case, front, tokens=BUDGET)
    batch = inputs(model, ROWS[1:2], SIZES[1:])
    cost = predict(ModelShape.from_config(model.config), config, counts(model, SIZES[1:]), text_tokens=5, words=[4, 3])
    whole, *steps = counted(model, lambda: model.generate(**batch, config=config, max_new_tokens=6, **GREEDY))
    assert whole == cost.total and (cost.parts["cache"] > 0) == (CASES[case][0] != "full")
    assert steps == [sum(cost.decode(step).values()) for step in range(1, 6)]


def answered(model, prepared, new_tokens):
    """The cache after so many new tokens of every row."""
    engine = Engine(model)
    engine.ends = set()
    return engine.generate(prepared, Sampling(max_new_tokens=new_tokens)).cache


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("case", CASES)
def test_kv_bytes_are_those_of_the_cache(model, case, front):
    """After prefill and after 24 steps: of each row, of the batch, and what a step reads."""
    config, shape = setting(case, front, tokens=BUDGET), ModelShape.from_config(model.config)
    prepared = model.prepare(**inputs(model, ROWS, SIZES), config=config)
    costs = predicted(prepared, counts(model, SIZES), shape, config)
    for steps in (0, 24):
        cache = answered(model, prepared, steps + 1)
        measured = kv_bytes(cache, costs, [steps + 1] * len(ROWS))
        assert [row["kv_bytes_live"] for row in measured] == [cost.kv_bytes(4, steps) for cost in costs]
        assert [row["kv_bytes_predicted"] for row in measured] == [cost.kv_bytes(4, steps) for cost in costs]
        storages = [tensor.untyped_storage() for layer in cache.layers for tensor in (layer.keys, layer.values)]
        occupied = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        assert (
            occupied
            == allocated_kv_bytes(costs, 4, steps)
            == sum(row["kv_bytes_allocated"] for row in measured) + occupied % len(ROWS)
        )
        for row, cost in enumerate(costs):
            # The counters on the device, rather than the plan that the prediction shares with the cache.
            live = [layer.front_len[row] + layer.image_len[row] + layer.text_len[row, 0] for layer in cache.layers]
            assert sum(map(int, live)) * shape.kv_entry(4) == cost.kv_bytes(4, steps)
            core = [layer.front_len[row] + layer.core_len[row] + layer.text_len[row, 0] for layer in cache.layers]
            if not cache.caching.policy.updates(steps + 1):
                assert cost.read_bytes(4, steps + 1) == (sum(map(int, core)) + len(core)) * shape.kv_entry(4)
    plain = predicted(prepared, counts(model, SIZES), shape, setting("full", front, tokens=BUDGET))
    smaller = [cost.kv_bytes(4, 64) < other.kv_bytes(4, 64) for cost, other in zip(costs, plain, strict=True)]
    assert any(smaller) == (case not in ("full", "core of all"))


def test_a_batch_of_different_ends(model):
    """A row's bytes are those at its own end, whatever its batch goes on with."""
    config, shape = setting("published"), ModelShape.from_config(model.config)
    prepared = model.prepare(**inputs(model, ROWS, SIZES), config=config)
    costs = predicted(prepared, counts(model, SIZES), shape, config)
    ends = [3, 20, 1]
    measured = kv_bytes(answered(model, prepared, 20), costs, ends)
    assert [row["kv_bytes_live"] for row in measured] == [
        cost.kv_bytes(4, new - 1) for cost, new in zip(costs, ends, strict=True)
    ]
    steps = [[cost.read_bytes(4, step) for step in range(1, new)] for cost, new in zip(costs, ends, strict=True)]
    assert [row["kv_bytes_read"] for row in measured] == [sum(read) // max(len(read), 1) for read in steps]
    assert measured[2]["kv_bytes_read"] == 0 and len(set(steps[1])) > 1


@pytest.mark.parametrize("case", ["published", "h2o"])
def test_a_shard_measures_a_policy(tmp_path, case):
    folder = save_llava_hf(build_reference("llava_next", num_hidden_layers=4), tmp_path / "checkpoint")
    data, checkpoint = make_vqav2(tmp_path / "data", 5, images=2), find_checkpoint(str(folder))
    config = setting(case, "adav and filter", tokens=9)
    run = Run(BENCHMARKS["vqav2"](data, checkpoint), config, checkpoint, Generation(9), tmp_path / "runs")
    other = Run(BENCHMARKS["vqav2"](data, checkpoint), setting("full"), checkpoint, Generation(9), tmp_path / "runs")
    assert run.folder != other.folder
    run.shards.mkdir(parents=True)
    rows = {}
    for size in (1, 5):
        spec = replace(run.order(0, run.samples, size), answers=tmp_path / f"{size}.jsonl")
        ShardAnswerer(spec).run(spec, threading.Event())
        rows[size] = [json.loads(line) for line in spec.answers.read_text().splitlines()]
    for alone, together in zip(rows[1], rows[5], strict=True):
        for key in ("answer", "kept", "layer_mean", "prefill_flops", "kv_bytes_live", "kv_bytes_predicted"):
            assert alone[key] == together[key]
        assert alone["kv_bytes_live"] == alone["kv_bytes_predicted"] <= alone["kv_bytes_allocated"]
    report = summarise(rows[5])
    assert report["kv_bytes_live"] == report["kv_bytes_predicted"]
    assert report["vision_tokens_per_image"]["after"] < report["vision_tokens_per_image"]["layer_mean"] < 9


def test_the_command_counts_a_policy(tmp_path, capsys):
    folder = save_llava_hf(build_reference("llava", num_hidden_layers=4), tmp_path / "checkpoint")
    keys = ["--vision-adaptive-attention", "true", "--text-pruning-flag", "true", "--text-init-cache", "0"]
    flops.main(
        [
            str(folder),
            "--method",
            "none",
            "--image-size",
            "56",
            "56",
            "--text-tokens",
            "80",
            "--element-size",
            "2000",
            *keys,
        ]
    )
    out = capsys.readouterr().out
    # 40 tokens before the image, 8 of its 16, 24 of the 40 behind it: 72 entries of 2 x 48 numbers of 2,000 bytes, in each of
    # 4 layers; then 62 of 104, and with none 96 and 160. The first step reads 40 + 4 + 24 + 1.
    assert f"after prefill: {72 * 768e3 / 1e6:,.1f} MB, {96 * 768e3 / 1e6:,.1f} MB with none" in out
    assert f"after 64 decode steps: {(48 + 62) * 768e3 / 1e6:,.1f} MB, {160 * 768e3 / 1e6:,.1f} MB with none" in out
    assert f"decode step 1 reads {69 * 768e3 / 1e6:,.1f} MB" in out and "decode step 3 reads" in out
