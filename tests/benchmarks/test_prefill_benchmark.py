"""benchmarks/prefill.py on its smallest preset: every method has its row, and wrong output gets no time."""

import csv
import dataclasses
import re

import prefill
import pytest
import torch
from shapes import PRESETS, Prompts
from support.graph_emulator import install

from llava.config import AdaVConfig
from llava.methods.before_llm import SELECTORS
from llava.methods.inside_llm import DROPPERS
from llava.model.decoding.dropping import Dropping

METHODS = ["none", *(name for name in SELECTORS if SELECTORS[name].uses_budget), *DROPPERS]


@pytest.mark.filterwarnings("ignore:no FitPrune table was fitted")
def test_every_method_has_its_row(tmp_path, capsys):
    output = tmp_path / "results" / "prefill.csv"
    flags = ["--preset", "tiny", "--device", "cpu", "--shares", "0.05", "0.5", "--crops", "1", "3", "--repeats", "1"]
    prefill.main([*flags, "--output", str(output)])
    rows = list(csv.DictReader(output.open()))
    names = METHODS[1:]
    lines = {name: [f"{name} crops={n}" for n in (1, 3)] if name == "adav_zoom" else [name] for name in names}
    assert [(row["method"], row["overall_tokens"]) for row in rows] == [
        ("none", "all"),
        *((own, tokens) for name in names for tokens in ("4", "40") for own in lines[name]),  # of 5 x 16 tokens
    ]
    plain, *others = rows
    assert plain["prefill_of_none"] == plain["gflops_of_none"] == "1.0" and plain["layer_mean_tokens"] == "80.0"
    for row in others:
        assert float(row["layer_mean_tokens"]) == float(row["overall_tokens"]) or row["method"] in DROPPERS
        assert 0 < float(row["gflops_of_none"]) < 1
        assert float(row["prefill_ms"]) > float(row["vision_ms"]) + float(row["llm_ms"]) > 0
        assert (row["selector_ms"] == "") == (row["method"] in DROPPERS)
        assert row["torch"] and row["device"] and row["threads"] and row["command"].startswith("python benchmarks/")
    printed = capsys.readouterr().out
    assert "80 vision tokens of 5 tiles" in printed and all(name in printed for name in names)


@pytest.mark.filterwarnings("ignore:no FitPrune table was fitted")
def test_caches_have_the_predicted_sizes():
    bench = prefill.Bench(PRESETS["tiny"], "cpu", torch.float32, seed=0)
    for method in METHODS:
        config = AdaVConfig(method=method, overall_tokens=16)
        found = bench.prefill(config)
        assert found.cached == found.seen == bench.cost(config).cached
        text = sum(bench.prompts.text)
        if method == "none":
            assert found.cached == (text + 80,) * 4
        elif method in DROPPERS:
            assert text + 80 >= found.cached[0] > found.cached[-1] > text
        else:
            assert found.cached == (text + 16,) * 4


@pytest.mark.filterwarnings("ignore:no FitPrune table was fitted")
def test_graphs_are_captured_before_times_count(monkeypatch):
    """Over emulated graphs: the vision tower and the short prompts, which methods of one budget share."""
    install(monkeypatch)
    graph, once, captured, before = torch.cuda.graph, prefill.Bench.prefill, [], []
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: captured.append(1) or graph(*args, **options))
    monkeypatch.setattr(prefill.Bench, "prefill", lambda *args: before.append(len(captured)) or once(*args))
    bench, saved = prefill.Bench(PRESETS["tiny"], "cpu", torch.float32, seed=0), []
    assert bench.engine.graphs
    assert not prefill.run(bench, METHODS, [0.05, 0.5], repeats=1, save=saved.extend, crops=[2])
    assert len(saved) == 1 + 2 * (len(METHODS) - 1) and len(before) == len(saved) * (prefill.WARM_UPS + 1)
    # No capture after the second repetition, so that the third one allocates all memory that captures released.
    assert before[2 * len(saved)] == len(captured)
    # Of the tower, one graph for each set of its states, and two more for one and for two tiles (adav_zoom). Prompts of 12
    # words with 4, 40 and 80 vision tokens are padded to 64, 64 and 128 tokens.
    states = {(), *(SELECTORS[name]().tower_states for name in METHODS if name in SELECTORS)}
    assert len(captured) == len(states) + 2 + 2


def test_wrong_output_gets_no_time(monkeypatch):
    bench = prefill.Bench(PRESETS["tiny"], "cpu", torch.float32, seed=0)
    config = AdaVConfig(method="cls", overall_tokens=4)
    cost = bench.cost(config)
    *others, last = cost.plans
    one_less = dataclasses.replace(last, front=last.front - 1)
    entry = prefill.Entry(config, dataclasses.replace(cost, plans=(*others, one_less)), [])
    assert bench.repeat(entry) == "its layers cache (16, 16, 16, 16) entries, expected are (16, 16, 16, 15)"
    assert not entry.times
    monkeypatch.setattr(Dropping, "note_layer", lambda dropping: dropping.stage_of.append(0))
    dropper = AdaVConfig(method="fastv", overall_tokens=4)
    entry = prefill.Entry(dropper, bench.cost(dropper), [])
    assert bench.repeat(entry) == "its layers see (92, 92, 92, 92) tokens, expected are (92, 92, 16, 16)"
    assert not entry.times
    entry = prefill.Entry(config, cost, [])
    assert not bench.repeat(entry) and len(entry.times) == 1
    bench.model.lm_head.weight.data[0] = float("inf")
    assert bench.repeat(entry) == "its logits are not finite" and len(entry.times) == 1


@pytest.mark.parametrize(("fails", "measured"), [("cls", ["none", "random"]), ("none", [])])
def test_a_method_that_fails(fails, measured, tmp_path, monkeypatch):
    """It is named and has no row; the others have theirs, unless there is nothing to set them against."""
    once, output = prefill.Bench.prefill, tmp_path / "p.csv"

    def broken(bench, config):
        if config.method == fails:
            raise RuntimeError("no kernel for this")
        return once(bench, config)

    monkeypatch.setattr(prefill.Bench, "prefill", broken)
    flags = ["--preset", "tiny", "--device", "cpu", "--repeats", "2", "--methods", "cls", "random"]
    with pytest.raises(SystemExit) as stop:
        prefill.main([*flags, "--output", str(output)])
    assert re.fullmatch(rf"{fails} at \d+: RuntimeError: no kernel for this, so no time is given", stop.value.code)
    rows = list(csv.DictReader(output.open())) if output.exists() else []
    assert [row["method"] for row in rows] == measured


def test_the_cpu_preset_is_llava_1_6s_image():
    config = PRESETS["cpu"].model_config()
    prompts = Prompts.random(PRESETS["cpu"], config, torch.empty(0), batch=1, seed=0)
    assert prompts.image.patches == (576,) * 5 and prompts.image.newlines == 0


def test_bad_arguments(capsys):
    for arguments, said in (
        (["--methods", "no_image"], '--methods names "no_image", allowed are none, random'),
        (["--shares", "1.5"], "--shares are numbers between 0 and 1"),
        (["--repeats", "0"], "--repeats is at least 1"),
        (["--crops", "2", "-1"], "--crops has -1, allowed are whole numbers of at least 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            prefill.main(["--preset", "tiny", "--device", "cpu", *arguments])
        assert stop.value.code == 2 and said in capsys.readouterr().err
