"""The published table in one command: the plan without weights, the prediction by hand, a whole run on made data."""

import csv
import shutil

import pytest
from benchmark_data import MAKERS
from tiny_checkpoints import build_reference, save_clip_tower, save_original

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.costs import flops
from llava.costs.measured_speed import MeasuredSpeed, preset_cost
from llava.eval import reproduce
from llava.eval.results.published import TABLE
from llava.eval.results.reproduction import FAMILIES, SIZES


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    for name in ("CKPT", "DATA_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_the_plan_needs_no_weights(tmp_path, capsys):
    reproduce.main(["v1_6", "--plan", "--subset", "500", "--data-root", str(tmp_path)])
    text = capsys.readouterr().out
    assert "liuhaotian/llava-v1.6-vicuna-7b" in text and "13 x 7 runs, 41,834 answers" in text
    assert "NVIDIA H100" in text and "GPU hours" in text and "GB more" in text
    for name in TABLE:
        assert f"- {name}: " in text and "https://" in text
    # Every run under the published tile rule, none once, and the budgets of the published table.
    commands = [line for line in text.splitlines() if line.startswith("    bash scripts/launch.sh")]
    assert len(commands) == 13 and all('"anyres": "fastervlm"' in line and "--subset 500" in line for line in commands)
    assert sum("--method none" in line for line in commands) == 1 and sum(" all 288 " in line for line in commands) == 4
    assert not list(tmp_path.iterdir())


def test_tables_of_families_are_complete():
    assert set(SIZES) == set(TABLE)
    assert FAMILIES["v1_5"].methods == ["fastv", "fitprune", "sparsevlm", "fastervlm", "adav"]
    assert FAMILIES["v1_6"].methods == ["fastv", "sparsevlm", "fastervlm", "adav"]


def test_the_prediction_goes_through_the_measured_points():
    speed = MeasuredSpeed.read(reproduce.SPEED)
    with open(reproduce.SPEED, newline="") as file:
        rows = {(row["provider"], row["name"], row["batch"]): row for row in csv.DictReader(file)}
    for name, config in (("none", {"method": "none"}), ("adav 144", {"method": "adav", "overall_tokens": 144})):
        row = rows["engine", name, "8"]
        cost = preset_cost(row["preset"], AdaVConfig(**config), 80)
        # A batch of 8: an eighth of its time to the first token, and of two further steps.
        measured = (float(row["ttft_ms"]) + 2 * float(row["step_ms"])) / 8000
        assert speed.seconds(cost, 80, 3) == pytest.approx(measured, rel=1e-6)
    with pytest.raises(UserError, match="two are needed"):
        MeasuredSpeed.read(reproduce.SPEED, batch=3)


def test_flops_of_a_preset_need_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flops.main(["llava-v1.5-7b", "--method", "adav", "--overall-tokens", "58"])
    text = capsys.readouterr().out
    assert text.startswith("llava-v1.5-7b, method adav: 576 vision tokens of 1 tiles -> 58.0 in the mean layer")
    flops.main(["llava-v1.6-vicuna-7b", "--method", "none", "--image-size", "1008", "336"])
    # A row of three tiles and the whole image, as LLaVA-1.6's own grids have it: 4 x 576 patches and 24 newlines.
    assert "2,328 vision tokens of 4 tiles" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, said",
    [
        (["v1_5", "--tokens", "144 144"], "different numbers of tokens"),
        (["v1_5", "--tokens", "few"], "whole number of at least 1"),
        (["v1_5", "--methods", "nothing"], '"nothing" is no method'),
        (["v2"], "invalid choice"),
        (["v1_5", "--checkpoint", "playground/llava-shapes-v1.5"], "has the files of no benchmark of the table"),
    ],
)
def test_bad_flags_are_one_sentence(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.main([*flags, "--data-root", str(tmp_path)])
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.count("\n") == 1 and said in shown


def test_a_whole_run_on_made_data(tmp_path, capsys, warm):
    model = build_reference("llava")
    checkpoint = save_original(model, tmp_path / "tiny", save_clip_tower(model, tmp_path / "tower"))
    for name in ("gqa", "pope"):
        MAKERS[name](tmp_path / "data", 6)
    flags = {"methods": "cls", "tokens": "4", "checkpoint": checkpoint, "data-root": tmp_path / "data", "shards": 1}
    flags |= {"output": tmp_path / "runs", "out": tmp_path / "out"}
    command = ["v1_5", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]
    reproduce.main(command)
    shown = capsys.readouterr()
    assert "warning: mmvet is left out" in shown.err and "2/2 cls 4: done" in shown.err
    names = ("table.md", "table.csv", "table.tex", "intervals.csv", "report.html")
    first = {name: (tmp_path / "out" / name).read_text() for name in names}
    assert "none, published" in first["table.md"] and "95 % bootstrap" in first["table.md"]
    rows = list(csv.DictReader(first["intervals.csv"].splitlines()))
    assert [(row["benchmark"], row["method"], row["tokens"]) for row in rows] == [
        *(("gqa", *run) for run in (("none", "all"), ("cls", "4"))),
        *(("pope", *run) for run in (("none", "all"), ("cls", "4"))),
    ]
    assert all(float(row["low"]) <= float(row["score"]) <= float(row["high"]) for row in rows)
    # Again, with the answers of one run torn: only these are asked again, and all files are the same.
    (torn,) = (tmp_path / "runs" / "gqa").rglob("cls-4-*/shards/shard-0.jsonl")
    torn.write_text("".join(f"{line}\n" for line in torn.read_text().splitlines()[:2]))
    shutil.rmtree(tmp_path / "out")
    reproduce.main(command)
    for name in names[:-1]:
        assert (tmp_path / "out" / name).read_text() == first[name]
