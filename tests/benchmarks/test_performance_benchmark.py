"""What fills docs/performance.md from a GPU run: gpu_profile.py and gpu.sh on the tiny preset, fill_performance.py on their files."""

import csv
import os
import re
import subprocess

import fill_performance
import gpu_profile
import pytest
import torch
from page import DOCUMENT, put
from record import read_csv, write_csv

from llava.common.errors import UserError
from llava.common.files import REPOSITORY
from llava.common.machine import commit

EMPTY = "nothing yet"
MADE = {
    **{"preset": "llava-v1.6-vicuna-7b", "repeats": 3, "backend": "cuda", "device": "a GPU", "dtype": "bfloat16"},
    **{"threads": 8, "python": "3.12.1", "torch": "2.11.0", "transformers": "5.17.0", "commit": "4156e43"},
    **{"command": "python benchmarks/it.py", "written": "2026-11-27T06:00:00+0000"},
}
FIGURES = ("ttft_ms", "ttft_ms_min", "ttft_ms_max", "vision_tower_ms", "projector_ms", "selection_ms", "prefill_ms")
FIGURES += ("tokens_per_s", "tokens_per_s_min", "tokens_per_s_max", "overhead_ms", "gb_per_s", "copy_gb_per_s")
FIGURES += ("read_gb_per_s", "weights_of_copy", "ceiling_tokens_per_s", "of_ceiling", "kv_mb", "peak_mb")
FIGURES += ("ttft_speedup", "decode_speedup")


def end_to_end_row(provider, name, batch, **figures):
    row = {"provider": provider, "name": name, "config": f"method={name}", "status": "measured", "layers": 32}
    row |= {"batch": batch, "at_once": batch, "new_tokens": 64, "vision_tokens": 2928, "text_tokens": 80}
    return row | {figure: figures.get(figure, 1.0 if not figures.get("status") else "") for figure in FIGURES} | figures


def kernel_row(provider, batch, of_copy):
    row = {"provider": provider, "batch": batch, "image_tokens": 2880, "core_share": 0.3, "us": 9.5, "graph_us": 8.25}
    return row | {"mb": 12.0, "gb_per_s": 2700, "of_copy": of_copy, "copy_gb_per_s": 3000.0, "error": "1.0e-03"}


STAGES = [
    {"batch": 1, "config": name, "prepare_ms": 6.0, "prefill_ms": 8.0, "step_ms": 5.4, "vision_tower_ms": 5.0}
    | {"projector_ms": 0.5, "selection_ms": 0.3, "splice_ms": 0.2, "device_step_ms": alone, "weights_gb_per_s": 2500}
    | {"captured_mb": 1700.0}
    for name, alone in (("none", 5.2), ("adav 144", ""))
]
KERNELS = [
    {"of": "none: step", "us": 5200.0 / n, "calls": 300 // n, "kernel": name}
    for n, name in enumerate(["all", "gemv<a | b>", *(f"kernel {n}" for n in range(12))], 1)
]
SDPA = [
    {"what": "decode", "length": 3009, "sdpa": name, "new_shape_ms": ms, "ms": ms} for name, ms in (("flash", 0.1), ("cudnn", ""))
]  # fmt: skip
PREFILL = [
    {"method": name, "overall_tokens": tokens, "layer_mean_tokens": 144.0, "prefill_ms": 20.0, "prefill_ms_min": 19.0}
    | {"prefill_ms_max": 22.0, "prefill_of_none": 0.25, "selector_ms": "", "llm_ms": 9.0, "predicted_gflops": 4900.0}
    | {"gflops_of_none": 0.11}
    for name, tokens in (("none", "all"), ("fastv", 144))
]


@pytest.fixture
def run(tmp_path):
    """A folder as a GPU run leaves it."""
    folder = tmp_path / "out"
    rows = [
        end_to_end_row("transformers", "all tokens", 1, ttft_ms=100.0, tokens_per_s=40.0),
        end_to_end_row("upstream", "adav 144", 1, ttft_ms=24.0, tokens_per_s=50.0),
        end_to_end_row("engine", "adav 144", 1, ttft_ms=16.0, tokens_per_s=190.0, weights_of_copy=0.86),
        end_to_end_row("engine", "A-VL, interval 16", 32, of_ceiling=0.91),
    ]
    write_csv(folder / "end_to_end.csv", rows, MADE)
    write_csv(
        folder / "decode_kernel.csv",
        [
            kernel_row("ours", 1, 0.7),
            kernel_row("ours", 8, 0.85),
            kernel_row("ours", 32, 0.92),
            kernel_row("sdpa", 8, 0.5),
        ],
        MADE | {"preset": "gpu"},
    )
    for name, part in (("stages", STAGES), ("kernels", KERNELS), ("sdpa", SDPA), ("prefill", PREFILL)):
        write_csv(folder / f"{name}.csv", part, MADE)
    return folder


@pytest.fixture
def page(tmp_path):
    """A copy of the page, and how to fill it: what is lacking, and the text it has then."""
    document = tmp_path / "docs" / "performance.md"
    document.parent.mkdir()
    document.write_text(DOCUMENT.read_text())
    for name in re.findall("<!-- end of (.*-cuda) -->", DOCUMENT.read_text()):
        put(document, name, EMPTY)

    def fill(folder, **options):
        lacking = fill_performance.fill(folder, tmp_path / "results", document, **options)
        return lacking, document.read_text()

    return fill


def between(text, name):
    return text.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0]


def test_a_whole_run_fills_the_page(run, page, tmp_path):
    before = DOCUMENT.read_text()
    lacking, text = page(run)
    assert lacking == [] and EMPTY not in text
    figures = [
        line.split("|")[2].strip() for line in between(text, "figures-llava-v1.6-vicuna-7b-cuda").splitlines()[3:]
    ]
    assert figures == ["6.25 x", "1.50 x", "86%", "4.75 x", "3.80 x", "91%", "85% to 92%"]
    assert "a GPU, 8 threads, bfloat16, torch 2.11.0" in between(text, "stages-llava-v1.6-vicuna-7b-cuda")
    assert "at commit 4156e43, 2026" in between(text, "end_to_end-llava-v1.6-vicuna-7b-cuda"), "no number"
    kernels = between(text, "kernels-llava-v1.6-vicuna-7b-cuda")
    assert "`gemv<a / b>`" in kernels and "kernel 4" in kernels and "kernel 5" not in kernels
    for stem in ("end_to_end-llava-v1.6-vicuna-7b-cuda", "decode_kernel-gpu-cuda", "prefill-llava-v1.6-vicuna-7b-cuda"):
        assert f"({stem}.png)" in between(text, stem)
        assert (tmp_path / "docs" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "results" / f"{stem}.csv").exists()
    assert between(text, "end_to_end-cpu-cpu") == between(before, "end_to_end-cpu-cpu"), "the CPU's table stays"
    assert page(run)[1] == text, "the second time changes nothing"


def test_what_is_not_there_is_named(run, page):
    for name in ("end_to_end", "prefill", "sdpa"):
        (run / f"{name}.csv").unlink()
    lacking, text = page(run)
    assert lacking == [f"{run} has no {name}" for name in ("end_to_end*.csv", "sdpa.csv", "prefill*.csv")]
    assert "85% to 92%" in text and between(text, "figures-llava-v1.6-vicuna-7b-cuda").count("not measured") == 6
    assert between(text, "end_to_end-llava-v1.6-vicuna-7b-cuda") == f"\n{EMPTY}\n"


def test_several_files_are_one_table(run, page, tmp_path):
    later = [
        end_to_end_row("engine", "adav 144", 1, ttft_ms=10.0, tokens_per_s=200.0),
        end_to_end_row("engine", "none", 32, status="out of memory"),
        end_to_end_row("engine", "A-VL, interval 16", 32, status="out of memory"),
    ]
    write_csv(
        run / "end_to_end-later.csv", later, MADE | {"command": "python benchmarks/later.py", "written": "2026-11-28"}
    )
    _, text = page(run)
    table = between(text, "end_to_end-llava-v1.6-vicuna-7b-cuda")
    assert "`python benchmarks/it.py` and `python benchmarks/later.py` at commit" in table
    assert table.count("out of memory") == 2
    figures = between(text, "figures-llava-v1.6-vicuna-7b-cuda")
    assert "10.00 x" in figures and figures.count("out of memory") == 1
    rows = read_csv(tmp_path / "results" / "end_to_end-llava-v1.6-vicuna-7b-cuda.csv", "ttft_ms")
    assert len(rows) == 5


def test_a_run_on_a_cpu_is_refused(run, page):
    rows = [row | {"backend": "cpu"} for row in STAGES]
    write_csv(run / "stages.csv", rows, {name: value for name, value in MADE.items() if name != "backend"})
    with pytest.raises(UserError, match="stages.csv was measured on a CPU, allowed is a run on a GPU"):
        page(run)
    lacking, _ = page(run, allow_cpu=True)
    assert any("allowed is one <!-- stages-llava-v1.6-vicuna-7b-cpu -->" in sentence for sentence in lacking)


def test_bad_arguments(run, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, said in (
        ([str(tmp_path / "none")], "none is no folder, allowed is the one that benchmarks/gpu.sh wrote into"),
        ([str(run), "--document", str(tmp_path / "none.md")], "none.md: there is no such file to fill"),
        ([str(empty)], "empty has nothing that benchmarks/gpu.sh writes"),
    ):
        with pytest.raises(SystemExit) as stop:
            fill_performance.main(arguments)
        assert stop.value.code == 2 and said in capsys.readouterr().err
    old = {name: value for name, value in MADE.items() if name != "backend"}
    write_csv(run / "stages.csv", STAGES, old)
    with pytest.raises(UserError, match="stages.csv has no column backend"):
        fill_performance.fill(run, tmp_path, DOCUMENT)
    with pytest.raises(SystemExit):
        gpu_profile.main(["--batches", "0"])
    assert "--batches is 0, allowed is at least 1" in capsys.readouterr().err


def test_the_profile(tmp_path, capsys, page):
    gpu_profile.main(["--preset", "tiny", "--device", "cpu", "--batches", "2", "--out", str(tmp_path)])
    stages = list(csv.DictReader((tmp_path / "stages.csv").open()))
    assert [(row["config"], row["batch"], row["device_step_ms"]) for row in stages] == [
        (name, "2", "") for name in ("none", "adav 144", "A-VL, interval 16")
    ]
    for row in stages:
        parts = [float(row[f"{stage}_ms"]) for stage in gpu_profile.STAGES]
        assert 0 < sum(parts) < 1.5 * float(row["prepare_ms"]) and float(row["step_ms"]) > 0
        assert float(row["weights_gb_per_s"]) >= 0 and row["captured_mb"] == "0.0" and row["backend"] == "cpu"
    kernels = list(csv.DictReader((tmp_path / "kernels.csv").open()))
    labels = [row["of"] for row in kernels if row["kernel"] == "all"]
    assert labels == [f"{name}: {part}" for name in gpu_profile.CONFIGS for part in ("first token", "step")]
    for label in labels:
        total, *others = (row for row in kernels if row["of"] == label)
        times = [float(row["us"]) for row in others]
        assert times == sorted(times, reverse=True) and len(times) <= gpu_profile.TOP
        assert sum(times) <= 1.001 * float(total["us"])
    assert "captured_mb" in capsys.readouterr().out and not (tmp_path / "sdpa.csv").exists()


def test_the_profile_without_what_fails(tmp_path, capsys, monkeypatch):
    """A configuration that runs out of memory, or fails, is named in the end; the others have their rows."""
    one = gpu_profile.Profiler.one

    def fails(profiler, prompts, name, with_kernels):
        if name == "none":
            raise torch.OutOfMemoryError
        if name == "adav 144":
            raise RuntimeError("no image for this device")
        return one(profiler, prompts, name, with_kernels=False)

    monkeypatch.setattr(gpu_profile.Profiler, "one", fails)
    with pytest.raises(SystemExit) as stop:
        gpu_profile.main(["--preset", "tiny", "--device", "cpu", "--batches", "1", "--out", str(tmp_path)])
    assert stop.value.code == (
        "batch 1, none: out of memory\nbatch 1, adav 144: RuntimeError: no image for this device"
    )
    rows = list(csv.DictReader((tmp_path / "stages.csv").open()))
    assert [row["config"] for row in rows] == ["A-VL, interval 16"]
    assert "Traceback" in capsys.readouterr().err


def test_the_script_takes_one_word(tmp_path):
    for arguments in ([], ["c"]):
        done = subprocess.run(
            ["bash", str(REPOSITORY / "benchmarks" / "gpu.sh"), *arguments],
            env=os.environ | {"OUT": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and 'takes one word, allowed are "a" and "b"' in done.stderr


def test_the_commit_may_be_given(monkeypatch):
    monkeypatch.setenv("ADAV_COMMIT", "4156e43")
    assert commit() == "4156e43"
    monkeypatch.setenv("ADAV_COMMIT", "")
    assert commit() != "4156e43"
