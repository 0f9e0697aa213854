"""benchmarks/decode_kernel.py on its smallest preset: every provider has its row, and wrong output gets none."""

import csv

import decode_kernel
import decode_providers
import pytest
import torch

from llava.kernels.decode_attention import DecodeOutput

TINY = ["--preset", "tiny", "--device", "cpu"]
NAMES = ["ours", "ours_scores", "sdpa", "index_select", "masked"]


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch):
    """Given instead of measured, which takes seconds (test_end_to_end_benchmark.py measures it once)."""
    for name in ("copy_bandwidth", "read_bandwidth"):
        monkeypatch.setattr(decode_kernel, name, lambda _: 1e10)


@pytest.mark.parametrize("shape", ["vicuna-7b", "yi-34b"])
def test_every_provider_has_its_row(shape, tmp_path, capsys):
    output = tmp_path / "results" / "decode.csv"
    decode_kernel.main([*TINY, "--shape", shape, "--output", str(output)])
    rows = list(csv.DictReader(output.open()))
    assert [row["provider"] for row in rows] == NAMES
    kv_heads = {"vicuna-7b": 32, "yi-34b": 8}[shape]
    per_slot = 2 * 2 * kv_heads * 128 * 4 / 1e6  # keys and values of two rows, float32
    for row in rows:
        assert (row["listed"], row["stored"]) == (str(35 + 12 + 64), str(35 + 40 + 64))
        slots = {"index_select": 3 * 111, "sdpa": 139, "masked": 139}.get(row["provider"], 111)
        assert float(row["mb"]) == pytest.approx(slots * per_slot, abs=1e-3)
        assert float(row["us_p20"]) <= float(row["us"]) <= float(row["us_p80"]) and row["graph_us"] == ""
        assert float(row["gb_per_s"]) >= 0 and float(row["error"]) <= 1e-5 and int(row["copies"]) >= 2
        assert row["command"].startswith("python benchmarks/decode_kernel.py") and row["torch"] and row["device"]
    printed = capsys.readouterr().out
    assert "a copy moves 10 GB/s" in printed and all(name in printed for name in NAMES)


@pytest.mark.parametrize("how", ["a value", "nan", "a score"])
def test_wrong_output_gets_no_row(how, tmp_path, monkeypatch):
    right = decode_providers.ours

    def wrong(step, workspace, out):
        found = DecodeOutput(*(None if t is None else t.clone() for t in right(step, workspace, out)))
        tensor = found.core_scores if how == "a score" else found.out
        if tensor is not None:
            tensor.view(-1)[7] = torch.nan if how == "nan" else tensor.view(-1)[7] + 0.01
        return found

    monkeypatch.setattr(decode_providers, "ours", wrong)
    output = tmp_path / "decode.csv"
    with pytest.raises(
        SystemExit, match="ours_scores at batch 2, 40 tokens, core 30%: its output is off .* no time is given"
    ):
        decode_kernel.main([*TINY, "--output", str(output)])
    names = [row["provider"] for row in csv.DictReader(output.open())]
    assert names == (["ours"] if how == "a score" else []) + NAMES[2:]


def test_the_baselines_are_what_they_say():
    case = decode_providers.Case(2, 30, 0.5, 4, 2, 16, torch.float32, "cpu")
    assert (case.core, case.listed, case.stored) == (15, 35 + 15 + 64, 35 + 30 + 64)
    step = decode_providers.Step(case, 0)
    assert not torch.equal(step.q, decode_providers.Step(case, 1).q)
    expected, everything = step.expected(False), step.expected(True)
    assert decode_providers.error(decode_providers.sdpa(step), everything) < 1e-5
    assert decode_providers.error(decode_providers.sdpa(step), expected) > 1e-2
    for listed in (decode_providers.index_select, decode_providers.masked):
        assert decode_providers.error(listed(step), expected) < 1e-5
        assert decode_providers.error(listed(step), everything) > 1e-2


def test_copies_overflow_the_cache(monkeypatch):
    monkeypatch.setattr(decode_providers, "cache_bytes", lambda device: 50 << 20)
    case = decode_providers.Case(1, 2880, 0.1, 32, 32, 128, torch.float16, "cpu")
    assert case.bytes(1) == 2 * 32 * 128 * 2
    copies = case.copies(128)
    assert 4 * (50 << 20) <= copies * case.bytes(case.listed) < 5 * (50 << 20)
    assert case.copies(3) == 3


def test_bad_arguments(capsys):
    for arguments, said in (
        (["--shares", "1.5"], "--shares are numbers above 0, up to 1"),
        (["--batches", "0"], "at least 1"),
        (["--tuning", "32", "0", "1"], "at least 1"),
    ):
        with pytest.raises(SystemExit) as stop:
            decode_kernel.main([*TINY, *arguments])
        assert stop.value.code == 2 and said in capsys.readouterr().err
