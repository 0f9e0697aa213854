"""FitPrune's calibration: its parts by hand, and a table from start to end."""

from types import SimpleNamespace

import pytest
import torch
from dropping_cases import IMAGE, LAYERS, config, greedy
from eval_data import make_vqav2, write_rows
from tiny_checkpoints import build_reference, make_image, save_llava_hf

from llava.analysis.fit_fitprune_table import main as calibrate
from llava.analysis.fit_fitprune_table import spare, until_reached, vision_flops
from llava.methods.inside_llm.fitprune_tables import read_tables
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model


def test_what_can_be_spared_by_hand():
    # 1, 2, 3, 4 sum to 10. With 7 to stay: 1 and 2 can go (7 is left), not 3. Equal values: the earlier goes first.
    assert spare(torch.tensor([4.0, 1, 3, 2]), 7.0).tolist() == [False, True, False, True]
    assert spare(torch.tensor([2.0, 2, 2]), 4.0).tolist() == [True, False, False]
    assert not spare(torch.tensor([1.0, 1]), 2.5).any() and spare(torch.tensor([1.0, 1]), 0.0).all()


def test_vision_flops_by_hand():
    # The public count per layer, n = 576, d = 4096, m = 11008: 4 n d^2 + 2 n^2 d + 3 n d m multiply-adds.
    n, d, m = 576, 4096, 11008
    sizes = SimpleNamespace(num_attention_heads=32, num_key_value_heads=32, hidden_size=d, intermediate_size=m)
    assert vision_flops(n, [0] * 32, sizes) == 2 * 32 * (4 * n * d * d + 2 * n * n * d + 3 * n * d * m)
    # 3 query heads of size 2 on 1 KV head, d = 5, m = 7; 4 tokens, of which 1 goes: q 4*5*6, k and v 4*5*4, attention
    # 2*16*6, then for 3 tokens o 3*6*5 and MLP 3*3*5*7: 120 + 80 + 192 + 90 + 315 = 797.
    sizes = SimpleNamespace(
        num_attention_heads=3, num_key_value_heads=1, head_dim=2, hidden_size=5, intermediate_size=7
    )
    assert vision_flops(4, [1], sizes) == 2 * 797
    # The published tables save what they say, less what rounding each layer down loses: 3.6 points of 10, 0.3 of 50 to 90.
    sizes = SimpleNamespace(num_attention_heads=32, num_key_value_heads=32, hidden_size=d, intermediate_size=m)
    for table in read_tables():
        whole = vision_flops(table.image_tokens, [0] * 32, sizes)
        saved = 100 * (1 - vision_flops(table.image_tokens, list(table.drops), sizes) / whole)
        assert saved == pytest.approx(table.ratio, abs=0.5 if table.ratio >= 50 else 5), table


def test_layers_after_the_target_drop_nothing():
    sizes = SimpleNamespace(num_attention_heads=1, num_key_value_heads=1, hidden_size=8, intermediate_size=8)
    full = vision_flops(10, [0, 0, 0], sizes)
    one = vision_flops(10, [5, 0, 0], sizes)
    assert until_reached([10], [[5, 3, 1]], full, sizes) == 0
    assert until_reached([10], [[5, 3, 1]], one, sizes) == 1 and until_reached([10], [[5, 3, 1]], one - 1, sizes) == 2
    assert until_reached([10], [[5, 3, 1]], 1, sizes) is None


@pytest.mark.parametrize("ratio", [30.0, 60.0])
def test_calibration_writes_a_table_that_saves_what_was_asked(tmp_path, capsys, ratio):
    model = build_reference("llava", num_hidden_layers=LAYERS, side=112)
    folder = save_llava_hf(model, tmp_path / "checkpoint")
    data = make_vqav2(tmp_path / "data", 5, images=3) / "vqav2"
    questions, out = data / "llava_vqav2_mscoco_test-dev2015.jsonl", tmp_path / "table.json"
    arguments = [folder, "--questions", questions, "--images", data / "test2015", "--out", out, "--device", "cpu"]
    calibrate([*map(str, arguments), "--ratio", str(ratio)])
    text = capsys.readouterr().out
    assert "4 questions" in text and str(out) in text
    (table,) = read_tables(out)
    assert (table.model, table.image_tokens, table.ratio) == ("checkpoint", 64, ratio)
    assert table.sizes == (LAYERS, 48, 80) and len(table.drops) == LAYERS
    sizes = model.config.text_config
    saved = 1 - vision_flops(64, list(table.drops), sizes) / vision_flops(64, [0] * LAYERS, sizes)
    # The mean of four questions meets the target and is rounded down in each layer: at most a token a layer short.
    one_more = [drop + 1 for drop in table.drops]
    assert 1 - vision_flops(64, one_more, sizes) / vision_flops(64, [0] * LAYERS, sizes) >= ratio / 100 > saved - 0.2
    _, loaded, processor, _ = load_pretrained_model(
        folder, config=config("fitprune", table=str(out), ratio=ratio), device_map="cpu"
    )
    pixels = process_images([make_image(40, 30)], processor, loaded.config)
    prepared = loaded.prepare(torch.tensor([[1, IMAGE, 9, 10]]), pixels)
    greedy(loaded, prepared)
    assert [64 - len(now) for now in prepared.dropping.survivors(0, 0)][-1] == sum(table.drops)
    for bad, words in (
        (["--ratio", "0"], "--ratio is 0, allowed is a percentage"),
        (["--ratio", "99.9"], "saves only"),
        (["--ratio", "50", "--limit", "0"], "--limit is 0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            calibrate([*map(str, arguments), *bad])
        assert words in capsys.readouterr().err
    write_rows(questions, [{"question_id": 1, "text": "Yes?"}])
    with pytest.raises(SystemExit, match="2"):
        calibrate([*map(str, arguments), "--ratio", "50"])
    assert "holds no question with an image" in capsys.readouterr().err
